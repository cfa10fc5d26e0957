"""Low-rank adapters on linear layers, and how they become part of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Linear):
    """A linear layer whose own weights stay, plus ``scale`` times a product of two thin matrices
    (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

    It starts as the layer itself, since one of the two is zero.

    Args:
        linear: whose weights it takes over.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        change = nn.functional.linear(nn.functional.linear(input, self.down), self.up)
        return super().forward(input) + self.scale * change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that gives the same."""
        whole = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        whole.weight = nn.Parameter(self.weight + self.scale * (self.up @ self.down))
        whole.bias = self.bias
        return whole


def merge(model: nn.Module) -> None:
    """Put one linear layer in the place of each with an adapter: the same answers, no more work."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRank):
                setattr(module, name, child.merged())
