"""A temporal convolutional network over history and horizon."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_ray.data.series.fit import SERIES, Window


class Block(nn.Module):
    """Two dilated convolutions that look back only, around a shortcut."""

    def __init__(self, width: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.back = (kernel - 1) * dilation
        self.first = nn.Conv1d(width, width, kernel, dilation=dilation)
        self.second = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, steps]"""
        inner = functional.relu(self.first(functional.pad(x, (self.back, 0))))
        return x + self.second(self.dropout(inner))  # type: ignore[no-any-return]


class Tcn(nn.Module):
    def __init__(
        self, window: Window, width: int, kernel: int, blocks: int, embedding: int, dropout: float
    ) -> None:
        super().__init__()
        self.window = window
        channels = 2 + window.past + window.known
        self.embed = nn.Embedding(window.series, embedding) if window.series > 1 else None
        self.into = nn.Conv1d(channels + (embedding if self.embed else 0), width, 1)
        self.blocks = nn.Sequential(
            *(Block(width, kernel, kernel**level, dropout) for level in range(blocks))
        )
        self.head = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, horizon] from a sample as `Window` tells it."""
        channels = [x[:, :SERIES], x[:, SERIES + 1 :]]
        if self.embed is not None:
            vector = self.embed(x[:, SERIES, 0].long())
            channels.append(vector.unsqueeze(2).expand(-1, -1, x.shape[2]))
        found = self.blocks(self.into(torch.cat(channels, 1)))
        return self.head(found[:, :, self.window.history :]).squeeze(1)  # type: ignore[no-any-return]


def tcn(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    window: Window,
    width: int = 32,
    kernel: int = 3,
    blocks: int | None = None,
    embedding: int = 8,
    dropout: float = 0.1,
) -> nn.Module:
    """Convolutions over time of ``kernel`` steps that lie 1, ``kernel``, ``kernel ** 2``, ... apart
    (Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent
    Networks for Sequence Modeling", 2018), through the horizon, where covariates and the calendar
    are known.

    Args:
        window: what the data say of a sample.
        blocks: default as many as it takes to see the whole history from the horizon's end.
        embedding: numbers that tell series apart, where there are several.

    Raises:
        ValueError: for a kernel of one step.
    """
    if kernel < 2:
        raise ValueError(f"kernel must be 2 or more steps, but got {kernel}")
    steps = window.history + window.horizon
    needed = math.ceil(math.log(steps, kernel))
    return Tcn(window, width, kernel, needed if blocks is None else blocks, embedding, dropout)
