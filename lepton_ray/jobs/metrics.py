"""Numbers of runs for Prometheus, through Ray's own metrics: each node of a cluster shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

# Ray puts `ray_` before each name, and Prometheus' `_total` after a counter's.
GAUGES = {
    "lepton_run_replicas": "Replicas that train.",
    "lepton_run_step": "Steps done.",
    "lepton_run_steps": "Steps of the whole run.",
    "lepton_run_steps_per_second": "Steps in a second, of late.",
    "lepton_run_goodput": "Share of the time since its start in which a run did steps that count.",
}
COUNTERS = {
    "lepton_run_resizes": "How often the number of replicas changed.",
    "lepton_run_redone_steps": "Steps that were done again after a loss.",
    "lepton_run_stood_still_seconds": "Seconds in which no replica trained, at losses and resizes.",
    "lepton_run_losses": "Replicas or nodes that were lost.",
    "lepton_study_trials": "Trials of a study that ended, by how.",
}


@dataclass
class Progress:
    """What a run's events add up to; `see` takes them one by one. Pure.

    Attributes:
        stood_still_s: seconds in which no replica trained.
        redone: steps that were done again.
    """

    started_at: float = 0.0
    now: float = 0.0
    step: int = 0
    steps: int = 0
    steps_per_s: float = 0.0
    replicas: int = 0
    resizes: int = 0
    losses: int = 0
    redone: int = 0
    stood_still_s: float = 0.0
    _restored: int | None = None

    def see(self, event: dict[str, Any]) -> None:
        at = event.get("at", self.now)
        self.started_at = self.started_at or at
        self.now = max(self.now, at)
        match event["kind"]:
            case "start":
                if self.replicas and event["replicas"] != self.replicas:
                    self.resizes += 1
                self.replicas = event["replicas"]
                self._restored = event["step"]
            case "first_step":
                if self._restored is not None:
                    self.redone += max(0, self.step - self._restored)
                    self._restored = None
                self.stood_still_s += event.get("stood_still_s") or 0.0
            case "failure" | "replica_failed":
                self.losses += 1
            case "resize":
                self.losses += any(word in event["reason"] for word in ("lost", "silent"))
            case "progress":
                self.steps, self.steps_per_s = event["steps"], event["steps_per_s"]
        if "step" in event and event["kind"] != "start":
            self.step = event["step"]

    @property
    def goodput(self) -> float:
        """Share of the time since the start in which steps were done that count."""
        elapsed = self.now - self.started_at
        if elapsed <= 0:
            return 1.0
        lost = self.stood_still_s
        if self.steps_per_s > 0:
            lost += self.redone / self.steps_per_s
        return max(0.0, 1 - lost / elapsed)


class RunMetrics:
    """Shows a run's `Progress` as metrics, for as long as the process lives.

    Args:
        experiment: its name, and ``run`` its id: the labels.
    """

    def __init__(self, experiment: str, run: str) -> None:
        tags = {"experiment": experiment, "run": run}
        keys = tuple(tags)
        self._gauges = {n: Gauge(n, text, keys) for n, text in GAUGES.items()}
        self._counters = {
            n: Counter(n, text, (*keys, "state") if n == "lepton_study_trials" else keys)
            for n, text in COUNTERS.items()
        }
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(tags)
        self._progress = Progress()
        self._counted: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of a training, or of a study."""
        if event["kind"].startswith("trial"):
            if event["kind"] == "trial_end":
                tags = {"state": event["record"].state}
                self._counters["lepton_study_trials"].inc(1, tags)
            return
        progress = self._progress
        progress.see(event)
        for name, value in (
            ("lepton_run_replicas", progress.replicas),
            ("lepton_run_step", progress.step),
            ("lepton_run_steps", progress.steps),
            ("lepton_run_steps_per_second", progress.steps_per_s),
            ("lepton_run_goodput", progress.goodput),
        ):
            self._gauges[name].set(value)
        self._count("lepton_run_resizes", progress.resizes)
        self._count("lepton_run_redone_steps", progress.redone)
        self._count("lepton_run_stood_still_seconds", progress.stood_still_s)
        self._count("lepton_run_losses", progress.losses)

    def _count(self, name: str, total: float) -> None:
        more = total - self._counted.get(name, 0.0)
        if more > 0:
            self._counters[name].inc(more)
            self._counted[name] = total
