"""A study: a search space, a searcher, a scheduler, and trials of the same training loop."""
