"""A study of two slots with real trainings and a simulated clock, which counts the processor's
seconds of each epoch: what a rule of stopping does, without the machine's noise.

Decisions are those of every study.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from pathlib import Path
from typing import Any

import _task
from _ours_study import experiment

from lepton_ray.config import with_settings
from lepton_ray.tuning.decisions import Decisions
from lepton_ray.tuning.journal import Journal, TrialStart
from lepton_ray.tuning.rules import Successive

START_S = 0.03  # of a trial, as measured by the overhead case


def seconds_to(
    task: str, seed: int, goal: float, limit_s: float, rule: str = "asha", searcher: str = "tpe"
) -> dict[str, Any]:
    """Simulated seconds to the first whole training that reaches the goal, or the limit."""
    named = {
        "tune.scheduler": "asha" if rule == "asha_27th" else rule,
        "tune.searcher": searcher,
    }
    asked = with_settings(experiment(task, 10**6, 10**9, seed, "unused"), named)
    arrays, epochs = _task.arrays_of(task), _task.epochs_of(task)
    events: list[tuple[float, int, Any, list[float]]] = []
    now, trials, whole = 0.0, 0, 0

    def go_on(number: int, training: Any) -> None:
        rows, at = [], now
        while True:
            began = time.process_time()
            rows.append(training.train_epoch())
            at += time.process_time() - began
            if training.epoch == epochs or study.rule.decides_at(number, training.epoch):
                break
        heapq.heappush(events, (at, number, training, rows))

    def start() -> None:
        nonlocal trials
        given = study.next()
        assert isinstance(given, TrialStart)
        settings = {path.removeprefix("model."): v for path, v in given.params.items()}
        trials += 1
        go_on(given.number, _task.make(task, settings, arrays, seed))

    with tempfile.TemporaryDirectory() as folder:
        study = Decisions(asked, Journal(Path(folder)), clock=lambda: now)
        if rule == "asha_27th":
            study.rule = Successive(epochs, epochs // 27)
        start()
        start()
        while True:
            now, number, training, rows = heapq.heappop(events)
            if now > limit_s:
                return {"seconds": limit_s, "hit": False, "trials": trials, "whole": whole}
            first, stop = training.epoch - len(rows) + 1, ""
            for epoch, value in enumerate(rows, first):
                last = epoch == epochs
                stop = study.report(number, epoch, {"val_loss": value}, last=last)
                if stop:
                    break
            if not stop and training.epoch < epochs:
                go_on(number, training)
                continue
            study.end(number, finished=not stop, metrics={"val_loss": rows[-1]})
            if not stop:
                whole += 1
                if rows[-1] <= goal:
                    return {"seconds": now, "hit": True, "trials": trials, "whole": whole}
            now += START_S
            start()
