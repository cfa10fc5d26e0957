"""lepton_ray's arm of benchmarks/tuning.py: its study over the same training code as the peers'.

    python _ours.py TASK TRIALS SECONDS SEED LOG [OUT]

What is replaced is only what a trial trains: decisions, journal, Tune and events are those of every
study. With OUT, MLflow records it too, and memory and waits are written there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
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


def main() -> None:
    task, trials, seconds, seed, log = sys.argv[1:6]
    options = {"task": task, "log": log, "seed": int(seed)}
    study.Trial = type("TaskTrial", (TaskTrial,), options)  # type: ignore[misc]
    here = str(Path(__file__).parent)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )  # fmt: skip
    arrays = ray.put(_task.arrays_of(task))
    with tempfile.TemporaryDirectory() as folder:
        asked = experiment(task, int(trials), float(seconds), int(seed), folder)
        if len(sys.argv) > 6:
            recorded(asked, arrays, folder, Path(sys.argv[6]))
        else:
            study.run(asked, arrays, folder=Path(folder) / "study")
    ray.shutdown()


def recorded(asked: Any, arrays: Any, folder: str, out: Path) -> None:
    """With MLflow, and a look at this process' memory after each tenth of the trials."""
    import os

    import psutil

    from lepton_ray.jobs.runs import RunFolder
    from lepton_ray.jobs.studies import STUDY, StudyWatcher
    from lepton_ray.jobs.watchers import Silent
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


if __name__ == "__main__":
    main()
