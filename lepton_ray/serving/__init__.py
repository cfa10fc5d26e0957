"""A model version: its one format, its runtime, and its endpoint on Ray Serve."""
