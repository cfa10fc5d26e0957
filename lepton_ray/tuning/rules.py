"""Which trials go on: pure decisions on what trials have reported so far, in the order it came.

All values here are such that less is better. A rule answers with the reason to stop, or "".
"""

from __future__ import annotations

import heapq
import math
import statistics
from typing import Protocol

from lepton_ray.config.schema import Tune

ETA = 3  # a rung keeps the best third
EXAMPLES = 5  # finished trials that show how a good one may begin
BRACKETS = 3
ENOUGH = 3  # trials the median is taken of


class Rule(Protocol):
    def decides_at(self, number: int, epoch: int) -> bool:
        """Whether a trial may be stopped after this epoch."""

    def judge(self, number: int, epoch: int, value: float) -> str:
        """The reason to stop, "" to go on; changes nothing."""

    def note(self, number: int, epoch: int, value: float, stopped: bool) -> None:
        """What was reported and decided counts from now on."""

    def finish(self, number: int, value: float) -> None:
        """A trial finished, within its constraints; the value is that of the weights it gives."""


def make_rule(tune: Tune, epochs: int) -> Rule:
    """The rule of a study whose longest trials have ``epochs`` epochs."""
    match tune.rule:
        case "asha":
            return Successive(epochs)
        case "hyperband":
            return Hyperband(epochs)
        case "median":
            return Median()
    return Everything()


class Everything:
    """All trials run to their end."""

    def decides_at(self, number: int, epoch: int) -> bool:
        return False

    def judge(self, number: int, epoch: int, value: float) -> str:
        return ""

    def note(self, number: int, epoch: int, value: float, stopped: bool) -> None:
        pass

    def finish(self, number: int, value: float) -> None:
        pass


class Successive:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934), without a free pass.

    A rung is an epoch (1, 3, 9, ... times ``first``) at which a trial must be among the best third
    of those that came there, or have begun as well as a good one did. In the usual form whoever
    comes first to a rung passes it, so that a bad trial that is early goes all the way. Here the
    first is judged by the rung below, as that stands now. One that is sent away so does not count
    at the rung it came to: the best of each rung therefore always goes on, and some trial always
    finishes.

    To have begun as well is to be no worse at the rung than one of the five best that finished
    was. Near the end of a search the trials are alike, and who is first early says little about who
    is first at the end: a third of them, chosen early, would be mostly luck.

    Args:
        first: epoch of the lowest rung; default a ninth. The searcher learns to propose what
            passes, and at a 27th that is what learns fast, not what ends well (docs/study.md).
    """

    def __init__(self, epochs: int, first: int | None = None) -> None:
        epoch = first or max(1, epochs // ETA**2)
        self.finished: list[tuple[float, int]] = []
        self.rungs: dict[int, dict[int, float]] = {}
        while 2 * epoch <= epochs:  # later than that, little is saved
            self.rungs[epoch] = {}
            epoch *= ETA

    def decides_at(self, number: int, epoch: int) -> bool:
        return epoch in self.rungs

    def judge(self, number: int, epoch: int, value: float) -> str:
        if epoch not in self.rungs or value <= self._began_as_well(epoch):
            return ""
        for rung in sorted((r for r in self.rungs if r <= epoch), reverse=True):
            others = [v for n, v in self.rungs[rung].items() if n != number]
            own = value if rung == epoch else self.rungs[rung].get(number)
            if not others or own is None:
                continue
            rank, count = 1 + sum(v < own for v in others), len(others) + 1
            if rank <= max(1, count // ETA):
                return ""
            return f"{rank} of {count} at epoch {rung}"
        return ""

    def _began_as_well(self, epoch: int) -> float:
        """The worst value at this rung of the five best that finished; -inf while fewer have."""
        if len(self.finished) < EXAMPLES:
            return -math.inf
        rung = self.rungs[epoch]  # a trial may have finished before it, by `train.early_stop`
        best = heapq.nsmallest(EXAMPLES, self.finished)
        return max((rung[n] for _, n in best if n in rung), default=-math.inf)

    def note(self, number: int, epoch: int, value: float, stopped: bool) -> None:
        rung = self.rungs.get(epoch)
        if rung is not None and (rung or not stopped):
            rung[number] = value

    def finish(self, number: int, value: float) -> None:
        self.finished.append((value, number))


class Hyperband:
    """Brackets of `Successive` with their first rungs at 1, 3, 9: a guard against metrics whose
    early values say little. Which bracket a trial is in follows from its number; a bracket gets as
    many trials as in Hyperband (arXiv 1603.06560)."""

    def __init__(self, epochs: int) -> None:
        lowest = max(1, epochs // ETA**3)
        firsts = [lowest * ETA**n for n in range(BRACKETS) if 2 * lowest * ETA**n <= epochs]
        self._brackets = [Successive(epochs, first) for first in firsts]
        top = len(firsts) - 1
        shares = [math.ceil(len(firsts) / (top - n + 1) * ETA ** (top - n)) for n in range(top + 1)]
        self._cycle = [n for n, share in enumerate(shares) for _ in range(share)]

    def _of(self, number: int) -> Successive | Everything:
        if not self._brackets:
            return Everything()
        return self._brackets[self._cycle[number % len(self._cycle)]]

    def decides_at(self, number: int, epoch: int) -> bool:
        return self._of(number).decides_at(number, epoch)

    def judge(self, number: int, epoch: int, value: float) -> str:
        return self._of(number).judge(number, epoch, value)

    def note(self, number: int, epoch: int, value: float, stopped: bool) -> None:
        self._of(number).note(number, epoch, value, stopped)

    def finish(self, number: int, value: float) -> None:
        self._of(number).finish(number, value)


class Median:
    """A trial whose best value so far is worse than the median of the others' means up to the same
    epoch is stopped (Golovin et al., Google Vizier, 2017)."""

    def __init__(self) -> None:
        self._curves: dict[int, list[float]] = {}

    def decides_at(self, number: int, epoch: int) -> bool:
        return True

    def judge(self, number: int, epoch: int, value: float) -> str:
        others = [c for n, c in self._curves.items() if n != number and len(c) >= epoch]
        if len(others) < ENOUGH:
            return ""
        median = statistics.median(statistics.fmean(c[:epoch]) for c in others)
        best = min([_or_worst(value), *self._curves.get(number, [])])
        return f"worse than the median of {len(others)} at epoch {epoch}" if best > median else ""

    def note(self, number: int, epoch: int, value: float, stopped: bool) -> None:
        self._curves.setdefault(number, []).append(_or_worst(value))

    def finish(self, number: int, value: float) -> None:
        pass


def _or_worst(value: float) -> float:
    """A median of numbers and of one that is none would be none."""
    return math.inf if math.isnan(value) else value
