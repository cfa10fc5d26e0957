"""The study of `_ours.py`. What is replaced is only what a trial trains: decisions, journal, Tune
and events are those of every study."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import _task
import ray

from lepton_ray.config import validate
from lepton_ray.tuning import study
from lepton_ray.tuning.trial import TELL_S, Trial

KINDS = {"log": "loguniform", "float": "uniform", "int": "randint", "choice": "choice"}


def experiment(task: str, trials: int, seconds: float, seed: int, storage: str) -> Any:
    space = {f"model.{n}": {KINDS[kind]: rest} for n, (kind, *rest) in _task.SPACE.items()}
    return validate(
        {
            "name": f"benchmark-{task}",
            "data": {"kind": "image", "source": "unused"},
            "model": {"name": "linear", **_task.OWN},
            "train": {"epochs": _task.epochs_of(task)},
            "tune": {
                "trials": trials,
                "parallel": 2,
                "seed": seed,
                "space": space,
                "budget": {"minutes": seconds / 60},
            },
            "storage": storage,
        }
    )


class TaskTrial(Trial):
    """A trial of the benchmark's task."""

    task, log, seed = "", "", 0

    def setup(self, config: Any, **given: Any) -> None:
        self._arrays = ray.get(given["dataset"][0])
        self._team = None
        self.reset_config(config)

    def reset_config(self, new_config: Any) -> bool:
        self._trial, self._training = dict(new_config), None
        return True

    def step(self) -> dict[str, Any]:
        began, rows, epochs = time.monotonic(), [], _task.epochs_of(self.task)
        if self._training is None:
            settings = {k.removeprefix("model."): v for k, v in self._trial["settings"].items()}
            self._training = _task.make(self.task, settings, self._arrays, self.seed)
        first = self._training.epoch + 1
        while True:
            rows.append({"val_loss": self._training.train_epoch()})
            last = self._training.epoch == epochs
            if last or self._training.epoch in self._trial["decide"]:
                break
            if time.monotonic() - began > TELL_S:
                break
        if last:
            _task.Log(self.log).whole(rows[-1]["val_loss"])
        result = {"epochs": rows, "first": first, "done": last, "finished": last}
        return result | ({"measured": list(rows[-1].items())} if last else {})


def run(task: str, trials: int, seconds: float, seed: int, log: str, out: str | None) -> None:
    """With the Ray of this process."""
    options = {"task": task, "log": log, "seed": seed}
    study.Trial = type("TaskTrial", (TaskTrial,), options)  # type: ignore[misc]
    arrays = ray.put(_task.arrays_of(task))
    with tempfile.TemporaryDirectory() as folder:
        asked = experiment(task, trials, seconds, seed, folder)
        _task.Log(log).ready()
        if out is None:
            study.run(asked, arrays, folder=Path(folder) / "study")
        else:
            recorded(asked, arrays, folder, Path(out))


def recorded(asked: Any, arrays: Any, folder: str, out: Path) -> None:
    """With MLflow, and a look at this process' memory after each tenth of the trials."""
    import os

    import psutil

    from lepton_ray.jobs.runs import RunFolder
    from lepton_ray.jobs.studies import STUDY, StudyWatcher
    from lepton_ray.terminal import Silent
    from lepton_ray.tracking.store import Tracker

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    run = RunFolder.create(asked, "tune")
    watcher = StudyWatcher(asked, Tracker(asked.name, Path(folder)), run, Silent(), {})
    process, ended, memory = psutil.Process(), 0, []

    def listen(event: dict[str, Any]) -> None:
        nonlocal ended
        watcher(event)
        if event["kind"] == "trial_end":
            ended += 1
            if ended % max(1, asked.tune.trials // 10) == 0:
                memory.append(process.memory_info().rss / 1e6)

    began = time.monotonic()
    study.run(asked, arrays, folder=run.path / STUDY, on_event=listen)
    watcher.close("FINISHED")
    seconds = time.monotonic() - began
    found = {"seconds": seconds, "memory_mb": memory, "waited_s": watcher.waited_s}
    out.write_text(json.dumps(found))
