"""Logistic regression."""

from __future__ import annotations

import math

from torch import nn


def linear(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One linear layer over the flattened input; logits [n, classes]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))
