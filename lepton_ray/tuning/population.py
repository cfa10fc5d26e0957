"""Population based training, a generation at a time, as pure functions of the generation before.

A member's part of a generation is one trial: it goes on from a checkpoint for some epochs, with
settings of its own. All wait for the last of a generation, so that what follows does not depend on
who was faster, and the whole can be done again to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_ray.config.schema import Distribution, Tune
from lepton_ray.data.order import generator
from lepton_ray.tuning.space import values_of

REPLACED = 4  # one in so many is replaced
RESAMPLED = 0.25  # probability that a setting is drawn anew instead of moved
FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Member:
    """One member's part of a generation, and how it ended."""

    number: int
    params: Mapping[str, Any]
    cost: float
    """Less is better; infinite when it failed."""


def total(tune: Tune, epochs: int) -> int:
    """Trials of a whole population based training."""
    return tune.population.size * math.ceil(epochs / tune.population.every)


def last_epoch(tune: Tune, number: int, epochs: int) -> int:
    """The epoch at which a trial's part ends."""
    generation = number // tune.population.size
    return min(epochs, (generation + 1) * tune.population.every)


def first_generation(tune: Tune, own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of the first members; the experiment's own are the first of them."""
    found = []
    for member in range(tune.population.size):
        drawn = {
            path: _draw(where, generator(tune.seed, "member", member, path))
            for path, where in tune.space.items()
        }
        found.append({**drawn, **own} if member == 0 else drawn)
    return found


def next_generation(
    tune: Tune, before: Sequence[Member], generation: int
) -> list[tuple[int, dict[str, Any]]]:
    """For each member, in its order: the trial it goes on from, and with which settings.

    The worse ones take over from one of the better each.
    """
    order = sorted(range(len(before)), key=lambda m: (before[m].cost, before[m].number))
    count = max(1, len(before) // REPLACED)
    failed = {m for m in order if not math.isfinite(before[m].cost)}
    losers = set(order[-count:]) | failed
    winners = [m for m in order[:count] if m not in losers] or order[:1]
    found = []
    for m, member in enumerate(before):
        if m not in losers:
            found.append((member.number, dict(member.params)))
            continue
        random = generator(tune.seed, "exploit", generation, m)
        winner = before[winners[int(random.integers(len(winners)))]]
        moved = {
            path: _move(tune.space[path], value, random) for path, value in winner.params.items()
        }
        found.append((winner.number, moved))
    return found


def _draw(where: Distribution, random: np.random.Generator) -> Any:
    values = values_of(where)
    if values is not None:
        return values[int(random.integers(len(values)))]
    low, high = where.corners
    if where.loguniform is not None:
        return float(math.exp(random.uniform(math.log(low), math.log(high))))
    return float(random.uniform(low, high))


def _move(where: Distribution, value: Any, random: np.random.Generator) -> Any:
    if random.random() < RESAMPLED:
        return _draw(where, random)
    values = values_of(where)
    if values is not None:  # a neighbour
        at = values.index(value) if value in values else 0
        return values[max(0, min(len(values) - 1, at + int(random.integers(2)) * 2 - 1))]
    low, high = where.corners
    return float(min(high, max(low, value * FACTORS[int(random.integers(2))])))
