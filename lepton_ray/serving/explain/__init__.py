"""Why a version answers as it does: weights of columns, words or pixels."""

BASELINE = "baseline.safetensors"
"""File with the mean of the training split's inputs, of a version of a table."""
