"""Stacked blocks that each explain a part of the history and forecast from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lepton_ray.data.series.fit import MEASURED, SERIES, VALUE, Window


class Block(nn.Module):
    """What it takes from the history, and what that adds to the forecast."""

    def __init__(
        self, inputs: int, window: Window, width: int, depth: int, ahead: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.backcast = nn.Linear(width, window.history)
        self.forecast = nn.Linear(width, window.horizon * ahead)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(x)
        return self.backcast(hidden), self.forecast(hidden)


class Nbeats(nn.Module):
    def __init__(
        self,
        window: Window,
        blocks: int,
        width: int,
        depth: int,
        summary: int,
        embedding: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.window, self.ahead = window, 8
        steps = window.history + window.horizon
        self.embed = nn.Embedding(window.series, embedding) if window.series > 1 else None
        # Of each time a few numbers, so that a long history does not make the first layer huge.
        self.summary = nn.Linear(window.past + window.known, summary)
        inputs = 2 * window.history + steps * summary + (embedding if self.embed else 0)
        self.blocks = nn.ModuleList(
            Block(inputs, window, width, depth, self.ahead, dropout) for _ in range(blocks)
        )
        self.head = nn.Sequential(
            nn.Linear(self.ahead + window.known, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, horizon] from a sample as `Window` tells it."""
        n, history = x.shape[0], self.window.history
        rest = x[:, VALUE, :history]
        around = torch.relu(self.summary(x[:, SERIES + 1 :].transpose(1, 2))).flatten(1)
        context = [x[:, MEASURED, :history], around]
        if self.embed is not None:
            context.append(self.embed(x[:, SERIES, 0].long()))
        forecast = torch.zeros(n, self.window.horizon * self.ahead, device=x.device)
        for block in self.blocks:
            back, ahead = block(torch.cat([rest, *context], 1))
            rest, forecast = rest - back, forecast + ahead
        steps = forecast.view(n, self.window.horizon, self.ahead)
        known = x[:, x.shape[1] - self.window.known :, history:].transpose(1, 2)
        return steps[..., 0] + self.head(torch.cat([steps, known], 2)).squeeze(2)  # type: ignore[no-any-return]


def nbeats(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    window: Window,
    blocks: int = 3,
    width: int = 128,
    depth: int = 2,
    summary: int = 4,
    embedding: int = 8,
    dropout: float = 0.1,
) -> nn.Module:
    """Blocks that pass on what they cannot explain of the history and add up their forecasts
    (Oreshkin et al., "N-BEATS", 2020), with covariates and the calendar beside the history, and
    again at each step ahead (as in Das et al., "Long-term Forecasting with TiDE", 2023).

    Args:
        window: what the data say of a sample.
        width, depth: units and layers of a block.
        summary: numbers that a block sees of each time's covariates and calendar.
        embedding: numbers that tell series apart, where there are several.
    """
    return Nbeats(window, blocks, width, depth, summary, embedding, dropout)
