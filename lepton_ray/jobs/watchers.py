"""Turn what replicas and trials report into MLflow runs and lines a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from lepton_ray.config import flatten, render
from lepton_ray.config.schema import Experiment
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.tracking.store import Tracker
from lepton_ray.tuning.journal import Journal, TrialRecord


class Terminal(Protocol):
    """Where a person reads how it goes."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def progress(self, text: str) -> None:
        """A line that the next one replaces."""


class Silent:
    """A terminal nobody reads."""

    def say(self, text: str) -> None:
        pass

    def progress(self, text: str) -> None:
        pass


class TrainingWatcher:
    """Turns what replica 0 reports into MLflow metrics, files of the run and a progress line.

    Args:
        recorded: epochs that MLflow has of the run.
    """

    def __init__(
        self,
        run_id: str,
        tracker: Tracker,
        terminal: Terminal,
        experiment: Experiment,
        folder: Path,
        *,
        recorded: int = 0,
    ) -> None:
        self._run_id = run_id
        self._folder = folder
        self._tensorboard = (
            SummaryWriter(str(folder / "tensorboard"), flush_secs=1)
            if experiment.train.tensorboard
            else None
        )
        self._tracker = tracker
        self._terminal = terminal
        self._epochs = experiment.train.epochs
        self._cause = ""
        self._last_step = 0
        self._stood_since = 0.0
        self._replicas = 0
        self._last_epoch = recorded

    def __call__(self, event: dict[str, Any]) -> None:
        self._dispatch(event)
        if "step" in event and event["kind"] != "start":
            self._last_step, self._stood_since = event["step"], event["at"]

    def close(self) -> None:
        """Write out what is on its way to files."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _dispatch(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "start":
                before, self._replicas = self._replicas, event["replicas"]
                self._restored = event["step"]
                if self._cause:
                    self._cause += f"; {before} -> {self._replicas} replicas"
                else:
                    origin = f", resumed at step {event['step']}" if event["step"] else ""
                    self._terminal.progress(f"train  {self._replicas} replicas{origin}")
            case "resize" | "failure":
                self._cause = event["reason"]
            case "first_step":
                if self._cause:
                    redone = max(0, self._last_step - self._restored)
                    stood = event["stood_still_s"]  # None where nobody was left to measure it
                    if stood is None:
                        stood = event["at"] - self._stood_since
                    self._terminal.say(
                        f"train  {self._cause}: on from step {self._restored}, {redone} steps "
                        f"redone, stood still {stood:.1f} s"
                    )
                    self._cause = ""
            case "progress":
                left = (event["steps"] - event["step"]) / max(event["steps_per_s"], 1e-9)
                self._terminal.progress(
                    f"train  step {event['step']}/{event['steps']}, "
                    f"{event['steps_per_s']:.0f} steps/s, {left:.0f} s left"
                )
            case "epoch":
                self._epoch(event["epoch"], event["metrics"], event["step"])
            case "history":  # of a new replica 0, or a resumed run
                for epoch, metrics in enumerate(event["epochs"], 1):
                    self._epoch(epoch, metrics, epoch * event["steps"])
            case "profile":
                self._profile(event["trace"], event["table"])
            case "refused" | "replica_failed":
                self._terminal.say(f"warning: {event['reason']}; training goes on without it")
            case "straggler":
                self._terminal.say(f"warning: {event['reason']}")
            case "checkpoint_failed":
                self._terminal.say(f"warning: {event['error']}; training goes on")

    def _epoch(self, epoch: int, metrics: dict[str, float], step: int) -> None:
        if epoch <= self._last_epoch:
            return
        self._last_epoch = epoch
        self._tracker.metrics(self._run_id, metrics, epoch)
        self._terminal.progress(f"train  epoch {epoch}/{self._epochs}: {numbers(metrics)}")
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def _profile(self, trace: bytes, table: str) -> None:
        path = self._folder / "profile.json.gz"
        try:
            path.write_bytes(trace)
            (self._folder / "profile.txt").write_text(table)
        except OSError as error:
            self._terminal.say(f"warning: no profile: {error}; training goes on")
        else:
            self._terminal.say(f"train  profile in {path}, for ui.perfetto.dev")


class StudyWatcher:
    """Turns a study's events into MLflow runs (a parent, a child a trial) and a progress line."""

    def __init__(
        self,
        experiment: Experiment,
        tracker: Tracker,
        folder: RunFolder,
        terminal: Terminal,
        tags: dict[str, str],
    ) -> None:
        assert experiment.tune is not None
        self._settings = experiment.tune
        self._tracker = tracker
        self._terminal = terminal
        self._children: dict[str, str] = {}
        self._ended = 0
        self._best: float | None = None
        found = folder.recall("study_run")
        if found is not None:
            self.run_id = str(found)
            tracker.reopen(self.run_id)
            tracker.end_children(self.run_id)
            journal = Journal(folder.path / "study")
            self._ended = len(journal.finished)
            best = journal.best(self._settings.mode)
            self._best = best.values[-1] if best else None
            return
        self.run_id = tracker.start(
            f"study {folder.id}",
            params=flatten(experiment.model_dump(mode="json")),
            tags=tags | {"lepton_ray.kind": "study"},
        )
        folder.remember("study_run", self.run_id)
        tracker.text(self.run_id, "experiment.yaml", render(experiment))

    def __call__(self, event: dict[str, Any]) -> None:
        trial = event["trial"]
        match event["kind"]:
            case "trial_start":
                self._children[trial] = self._tracker.start(
                    f"trial {trial}",
                    params=event["params"],
                    tags={"lepton_ray.kind": "trial"},
                    parent=self.run_id,
                )
            case "trial_result":
                self._tracker.metrics(self._children[trial], event["metrics"], event["epoch"])
            case "trial_end":
                self._end(self._children.pop(trial), event["record"])
        best = f", best {self._settings.metric} {self._best:.4f}" if self._best is not None else ""
        self._terminal.progress(
            f"tune   {self._ended} of {self._settings.trials} trials done, "
            f"{len(self._children)} running{best}"
        )

    def _end(self, run_id: str, record: TrialRecord) -> None:
        self._ended += 1
        self._tracker.tags(run_id, {"lepton_ray.state": record.state})
        if record.error:
            self._tracker.text(run_id, "error.txt", record.error)
        self._tracker.finish(run_id, "FAILED" if record.state == "failed" else "FINISHED")
        if record.state == "finished":
            pick = min if self._settings.mode == "min" else max
            values = [record.values[-1]] + ([self._best] if self._best is not None else [])
            self._best = pick(values)

    def end(self, status: Any, best: TrialRecord | None = None) -> None:
        """Close the parent run, and the children that were cut off."""
        for run_id in self._children.values():
            self._tracker.finish(run_id, "KILLED")
        if best is not None:
            self._tracker.metrics(self.run_id, {self._settings.metric: best.values[-1]}, 0)
            self._tracker.tags(
                self.run_id, {f"best.{path}": str(v) for path, v in best.params.items()}
            )
        self._tracker.finish(self.run_id, status)


def to_all(*watchers: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A watcher that passes each event on."""

    def tell(event: dict[str, Any]) -> None:
        for watcher in watchers:
            watcher(event)

    return tell


def numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
