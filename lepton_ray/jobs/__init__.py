"""Where runs happen and what is left of them: the Ray session and the folder of a run."""
