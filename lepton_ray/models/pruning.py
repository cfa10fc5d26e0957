"""A smaller model out of a larger one of the same kind, by leaving out its weakest channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRUNABLE = ("cnn", "mlp")
"""Built-in models that are a plain sequence of layers, so that a channel has one place."""


@torch.no_grad()
def prune(large: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """The state of ``small`` that keeps, in each hidden layer of ``large``, the channels (or units)
    whose incoming weights have the largest sum of magnitudes (Li et al., "Pruning Filters for
    Efficient ConvNets", 2017). It answers as ``large`` does with the other channels at zero.

    Args:
        large, small: sequences of the same layers, where ``small`` has no more channels in any.

    Raises:
        ValueError: when a layer of ``small`` is larger.
    """
    state: dict[str, Tensor] = {}
    kept = torch.empty(0, dtype=torch.long)  # channels of the layer before, none before the first
    before = 0
    for (name, layer), twin in zip(large.named_children(), small.children(), strict=True):
        own = layer.state_dict()
        if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(twin, nn.Linear | nn.Conv2d):
            weight, left = layer.weight, twin.weight.shape[0]
            if left > len(weight):
                raise ValueError(f"layer {name} has {len(weight)} channels, fewer than {left}")
            if before:
                each = weight.shape[1] // before  # inputs from one channel, behind a flattening
                weight = weight[:, (kept[:, None] * each + torch.arange(each)).reshape(-1)]
            before = len(weight)
            strength = layer.weight.abs().flatten(1).sum(1)
            kept = strength.argsort(descending=True, stable=True)[:left].sort().values
            own["weight"] = weight
        for part, value in own.items():
            state[f"{name}.{part}"] = (value[kept] if value.ndim else value).clone()
    return state
