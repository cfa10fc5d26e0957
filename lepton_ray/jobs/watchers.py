"""Turn what replicas and trials report into MLflow runs and lines a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lepton_ray.config.schema import Experiment
from lepton_ray.terminal import Terminal
from lepton_ray.tracking.store import Tracker


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
        self._tensorboard = None
        if experiment.train.tensorboard:
            from tensorboardX import SummaryWriter  # and clouds' libraries, for a third of a second

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), flush_secs=1)
        self._tracker = tracker
        self._terminal = terminal
        self._epochs = experiment.train.epochs
        self._cause = ""
        self._last_step = 0
        self._stood_since = 0.0
        self._replicas = 0
        self._last_epoch = recorded
        self._told = ""

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
                    tell = self._terminal.say if event["step"] else self._terminal.progress
                    origin = f", resumed at step {event['step']}" if event["step"] else ""
                    tell(f"train  {self._replicas} replicas{origin}")
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
            case "joined":
                self._terminal.say(
                    f"train  step {event['step']}: who joined holds the state, which came in "
                    f"{event['parts']} parts; {event['hosts']} replicas do the work"
                )
            case "progress":
                left = (event["steps"] - event["step"]) / max(event["steps_per_s"], 1e-9)
                self._terminal.progress(
                    f"train  step {event['step']}/{event['steps']}, "
                    f"{event['steps_per_s']:.0f} steps/s, {left:.0f} s left{self._told}"
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
        told = f"epoch {epoch}/{self._epochs}: {numbers(metrics)}"
        self._told = f"; {told}"  # repeated, because a log shows only some of these lines
        self._terminal.progress(f"train  {told}")
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


def to_all(*watchers: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A watcher that passes each event on."""

    def tell(event: dict[str, Any]) -> None:
        for watcher in watchers:
            watcher(event)

    return tell


def numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
