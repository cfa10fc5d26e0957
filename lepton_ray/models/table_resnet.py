"""A residual network over the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ENDS = 0.02  # share of a scaled column in its two outer intervals


class Bins(nn.Module):
    """Each amount as how far it has come through each of some intervals, and as a vector of that.

    The piecewise linear encoding of Gorishniy et al., "On Embeddings for Numerical Features in
    Tabular Deep Learning" (2022), with intervals between quantiles of the normal distribution:
    the preprocessing has already given each column about that.
    """

    columns: Tensor
    start: Tensor
    inverse: Tensor

    def __init__(self, columns: Sequence[int], bins: int, width: int) -> None:
        super().__init__()
        shares = torch.linspace(0.0, 1.0, bins + 1).clamp(ENDS / bins, 1 - ENDS / bins)
        edges = torch.special.ndtri(shares.double()).float()
        self.register_buffer("columns", torch.tensor(columns))
        self.register_buffer("start", edges[:-1].clone())
        self.register_buffer("inverse", 1.0 / (edges[1:] - edges[:-1]))
        bound = (bins + 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(len(columns), bins + 1, width).normal_(0.0, bound))
        self.bias = nn.Parameter(torch.zeros(len(columns), 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, columns * width] from [n, features]."""
        amounts = x[:, self.columns].unsqueeze(2)
        passed = ((amounts - self.start) * self.inverse).clamp(0.0, 1.0)
        # Beside the intervals the amount itself, so that what lies beyond the ends is told apart.
        parts = torch.cat([passed, amounts], 2).transpose(0, 1)
        return (parts @ self.weight + self.bias).relu().transpose(0, 1).flatten(1)


class Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class TableResnet(nn.Module):
    def __init__(
        self,
        blocks: Sequence[int],
        classes: int,
        bins: int,
        embedding: int,
        width: int,
        depth: int,
        dropout: float,
    ) -> None:
        super().__init__()
        starts = [sum(blocks[:at]) for at in range(len(blocks))]
        amounts = [start for start, size in zip(starts, blocks, strict=True) if size == 1]
        self.wide = [(s, s + size) for s, size in zip(starts, blocks, strict=True) if size > 1]
        self.amounts = Bins(amounts, bins, embedding) if amounts else None
        # The vector of a category, as the sum over a block where all but one number are zero.
        self.vectors = nn.ModuleList(
            nn.Linear(end - start, min(embedding, end - start), bias=False)
            for start, end in self.wide
        )
        size = len(amounts) * embedding + sum(
            min(embedding, end - start) for start, end in self.wide
        )
        self.first = nn.Linear(size, width)
        self.blocks = nn.Sequential(*(Residual(width, dropout) for _ in range(depth)))
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, classes] from [n, features]."""
        parts = [] if self.amounts is None else [self.amounts(x)]
        for vector, (start, end) in zip(self.vectors, self.wide, strict=True):
            parts.append(vector(x[:, start:end]))
        outputs: Tensor = self.head(self.blocks(self.first(torch.cat(parts, 1))))
        return outputs


def table_resnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    columns: Sequence[int],
    bins: int = 64,
    embedding: int = 32,
    width: int = 128,
    depth: int = 1,
    dropout: float = 0.2,
) -> nn.Module:
    """A vector for each column, then ``depth`` residual blocks of ``width`` units, and dropout.

    Args:
        columns: how many numbers of a row belong together; given by the data. One is an amount,
            more are a category.
        bins: intervals of an amount.
        embedding: numbers of a column's vector.

    Raises:
        ValueError: for a size below 1.
    """
    for name, value in {"bins": bins, "embedding": embedding, "width": width}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    return TableResnet(columns, classes, bins, embedding, width, depth, dropout)
