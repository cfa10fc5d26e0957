"""A multilayer perceptron over the flattened input."""

from __future__ import annotations

import math

from torch import nn


def mlp(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 128,
    depth: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """``depth`` hidden layers of ``width`` units with ReLU and dropout; logits [n, classes]."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(input_shape)
    for _ in range(depth):
        layers += [nn.Linear(size, width), nn.ReLU(), nn.Dropout(dropout)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))
