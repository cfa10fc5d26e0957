"""A study as it runs: its MLflow runs and the table a person watches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lepton_ray.config import flatten, render
from lepton_ray.config.schema import Experiment
from lepton_ray.jobs.recorder import Recorder
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.terminal import Terminal
from lepton_ray.tracking.store import Status, Tracker
from lepton_ray.tuning import results, status
from lepton_ray.tuning.journal import FILE, Journal, TrialRecord

STUDY = "study"  # the study's folder in a run's
JOURNAL = f"{STUDY}/{FILE}"
SHOW_S = 0.2  # between two tables


class StudyWatcher:
    """Turns a study's events into MLflow runs (a parent, a child a trial) and a table.

    Args:
        journal: the study's own, which the table is of.
        target: trials in all.
    """

    def __init__(
        self,
        experiment: Experiment,
        tracker: Tracker,
        folder: RunFolder,
        terminal: Terminal,
        tags: dict[str, str],
        *,
        target: int | None = None,
    ) -> None:
        assert experiment.tune is not None
        self._settings = experiment.tune
        self._tracker = tracker
        self._terminal = terminal
        self._folder = folder.path / STUDY
        self._target = target
        self._shown_at = -SHOW_S
        found = folder.recall("study_run")
        if found is None:
            found = tracker.start(
                f"study {folder.id}",
                params=flatten(experiment.model_dump(mode="json")),
                tags=tags | {"lepton_ray.kind": "study"},
            )
            folder.remember("study_run", found)
            tracker.text(found, "experiment.yaml", render(experiment))
        else:
            tracker.reopen(str(found))
        self.run_id = str(found)
        self._journal = Journal(self._folder, read_only=True)
        self._recorder = Recorder(tracker, self.run_id, self._journal)

    def __call__(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "opened":
                self._journal = event["journal"]
            case "trial_start":
                self._recorder.start(event["trial"], event["params"])
            case "trial_result":
                self._recorder.metrics(event["trial"], event["epoch"], event["metrics"])
            case "trial_end":
                self._recorder.end(event["record"])
        now = time.monotonic()
        if now - self._shown_at >= SHOW_S:
            self._shown_at = now
            shown = status.lines(self._settings, self._journal, target=self._target)
            self._terminal.progress("\n".join(shown))

    @property
    def waited_s(self) -> float:
        """For how long the study stood still for MLflow."""
        return self._recorder.waited_s

    def close(self, outcome: Status, best: TrialRecord | None = None) -> None:
        """End the parent run, and the children that were cut off."""
        if not self._recorder.close():
            self._terminal.say(
                f"warning: MLflow took not all of the study; {self._folder} has it, and --resume "
                "or --add-trials writes the rest"
            )
        if best is not None:
            values = dict(
                zip(self._settings.metrics, results.objectives(self._settings, best), strict=True)
            )
            self._tracker.metrics(self.run_id, values, 0)
            self._tracker.tags(
                self.run_id,
                {
                    "best.trial": best.id,
                    **{f"best.{path}": str(v) for path, v in best.params.items()},
                },
            )
        self._tracker.finish(self.run_id, outcome)


def overview(
    name: str | None = None, root: Path = Path("lepton_results")
) -> dict[str, tuple[str, list[str], dict[str, Any]]]:
    """The last study of each experiment below a folder of results, from its journal alone.

    Returns:
        By experiment: the run's folder, lines for a person, and the same as plain values.
    """
    found = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if name not in (None, folder.name):
            continue
        runs = [r for r in sorted(folder.iterdir()) if status.exists(r / STUDY)]
        if not runs:
            continue
        run = RunFolder.open(str(runs[-1]))
        tune = run.experiment().tune
        assert tune is not None
        target = tune.trials + (run.recall("more_trials") or 0)
        journal = Journal(run.path / STUDY, read_only=True)
        state = status.state(tune, journal, target=target)
        ended = journal.closed and f"ended: {journal.closed}"
        state["stands"] = ended or f"last heard of {state['quiet_s']:.0f} s ago"
        lines = status.lines(tune, journal, target=target)
        found[folder.name] = (run.uri, lines, state)
    return found
