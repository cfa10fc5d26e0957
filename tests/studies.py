"""Studies without Ray: trials that are played by a function of their settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.tuning.decisions import Decisions
from lepton_ray.tuning.journal import Journal, TrialRecord, TrialStart

LR = "train.optimizer.lr"
SPACE = {LR: {"loguniform": [1e-4, 1e-1]}, "model.width": {"choice": [8, 16, 32]}}
OWN = {LR: 0.003, "model.width": 16}


def experiment(epochs: int = 9, **tune: Any) -> Experiment:
    return validate(
        {
            "name": "tuning",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "cnn", "width": 16},
            "train": {"epochs": epochs, "optimizer": {"lr": 0.003}},
            "tune": {"searcher": "random", "space": SPACE, **tune},
        }
    )


def loss(params: Mapping[str, Any], epoch: int) -> float:
    """Falls with the epochs; best at a rate of 0.01 and a width of 32."""
    distance = (
        abs(math.log10(params.get(LR, 0.003)) + 2) + (32 - params.get("model.width", 32)) / 64
    )
    return (0.05 + distance) * (1 + 2.0 / epoch)


class KilledError(Exception):
    """The driver is gone."""


class Player:
    """Plays the trials of a study.

    Args:
        slots: trials at a time.
        order: seed of which of them is heard next.
        patience: reports and ends after which the driver is killed.
    """

    def __init__(
        self,
        asked: Experiment,
        folder: Path,
        *,
        slots: int = 1,
        order: int = 0,
        patience: float = math.inf,
        play: Callable[[Mapping[str, Any], int], float] = loss,
        extras: Callable[[TrialStart], dict[str, float]] = lambda start: {},
        **options: Any,
    ) -> None:
        self.journal = Journal(folder)
        self.decisions = Decisions(asked, self.journal, **options)
        self._slots = slots
        self._random = random.Random(order)
        self._patience = patience
        self._play, self._extras = play, extras
        self.heard: list[tuple[Any, ...]] = []

    def go(self) -> Player:
        running: list[tuple[TrialStart, int]] = []
        while True:
            while len(running) < self._slots:
                start = self.decisions.next()
                if isinstance(start, str):
                    break
                self._note("start", start.number, tuple(start.params.items()), start.parent)
                running.append((start, self._first(start)))
            if not running:
                return self
            start, epoch = running.pop(self._random.randrange(len(running)))
            params = start.params
            metrics = {"val_loss": self._play(params, epoch), **self._extras(start)}
            last = epoch == self._last(start)
            stop = self.decisions.report(start.number, epoch, metrics, last=last)
            self._note("report", start.number, epoch, stop)
            if stop or last:
                self.decisions.end(start.number, finished=last and not stop, metrics=metrics)
                self._note("end", start.number)
            else:
                running.append((start, epoch + 1))

    def _first(self, start: TrialStart) -> int:
        tune = self.decisions.tune
        generation = start.number // tune.population.size if start.kind == "member" else 0
        return generation * tune.population.every + 1

    def _last(self, start: TrialStart) -> int:
        tune = self.decisions.tune
        if start.kind == "member":
            return self._first(start) + tune.population.every - 1
        return int(start.params.get("train.epochs", self.decisions.epochs))

    def _note(self, *what: Any) -> None:
        self.heard.append(what)
        if len(self.heard) >= self._patience:
            raise KilledError


def decided(journal: Journal) -> list[Any]:
    """All that was decided, without times."""
    starts = [(s.number, s.params, s.kind, s.parent) for s in journal.starts.values()]
    reports = [(n, r.epoch, r.value, r.stop) for n, r in journal.order]
    ends = [(r.number, r.state, r.values, r.reason) for r in journal.finished]
    return [starts, reports, ends]


def record(number: int, **values: Any) -> TrialRecord:
    given = {"number": number, "params": OWN, "state": "finished", "values": [1.0], **values}
    return TrialRecord(**given)
