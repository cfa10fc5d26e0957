"""A study in MLflow: a parent run and a child for each trial, by one writer beside the study.

The study never waits for MLflow: a thread takes what has gathered and writes each trial's part in
few calls. What could not be written is tried again, and the journal has all of it in any case.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow.exceptions import MlflowException

from lepton_ray.tracking.store import Status, Tracker
from lepton_ray.tuning.journal import Journal, TrialRecord

logger = logging.getLogger(__name__)

WRITE_S = 1.0  # between two writes
TRIES = 5
STATUS: dict[str, Status] = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
TRIAL = "lepton_ray.trial"
KIND = "lepton_ray.trial_kind"


@dataclass
class _Part:
    """What is to be written of one trial."""

    params: Mapping[str, Any] | None = None
    """When it has started."""
    metrics: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    record: TrialRecord | None = None
    """When it has ended."""


class Recorder:
    """Writes the children of one parent run.

    Args:
        journal: of a study that goes on; its trials keep their runs, and what MLflow lacks of them
            is written.
    """

    def __init__(self, tracker: Tracker, parent: str, journal: Journal) -> None:
        self._tracker = tracker
        self._parent = parent
        self._queue: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()
        self._waiting: dict[str, _Part] = {}
        self._logged: dict[str, set[tuple[str, int]]] = {}
        self._failures = 0
        self.waited_s = 0.0
        """For how long the study stood still for MLflow."""
        self._runs = tracker.children(parent, TRIAL)
        self._catch_up(journal)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def start(self, trial: str, params: Mapping[str, Any]) -> None:
        self._queue.put(("start", trial, params))

    def metrics(self, trial: str, epoch: int, values: Mapping[str, float]) -> None:
        self._queue.put(("metrics", trial, (epoch, values)))

    def end(self, record: TrialRecord) -> None:
        self._queue.put(("end", record.id, record))

    def close(self) -> bool:
        """Write the rest; False when some of it could not be written."""
        began = time.monotonic()
        self._end.set()
        self._thread.join()
        self.waited_s += time.monotonic() - began
        for run_id in self._open.values():
            self._tracker.finish(run_id, "KILLED")
        return not self._waiting

    @property
    def _open(self) -> dict[str, str]:
        return {t: r for t, (r, status) in self._runs.items() if status == "RUNNING"}

    def _catch_up(self, journal: Journal) -> None:
        for number, start in journal.starts.items():
            record = journal.ended.get(number)
            run_id, status = self._runs.get(start.id, ("", ""))
            if record is not None and status == STATUS[record.state]:
                continue
            name = journal.header["metric"][0]
            if run_id:
                names = [name, *(record.metrics if record else ())]
                known = self._tracker.steps(run_id, names)
                self._logged[start.id] = {(n, step) for n, steps in known.items() for step in steps}
            reports = [(r.epoch, {name: r.value}) for r in journal.reports[number]]
            if record is not None or reports:
                self._waiting[start.id] = _Part(start.params, list(reports), record)

    def _work(self) -> None:
        while True:
            over = self._end.wait(WRITE_S)
            self._gather()
            self._write()
            if over and (not self._waiting or self._failures >= TRIES):
                return

    def _gather(self) -> None:
        while True:
            try:
                what, trial, value = self._queue.get_nowait()
            except queue.Empty:
                return
            part = self._waiting.setdefault(trial, _Part())
            if what == "start":
                part.params = value
            elif what == "metrics":
                part.metrics.append(value)
            else:
                part.record = value

    def _write(self) -> None:
        for trial in list(self._waiting):
            try:
                self._write_part(trial, self._waiting[trial])
                del self._waiting[trial]
                self._failures = 0
            except (MlflowException, OSError) as error:
                self._failures += 1
                logger.warning("MLflow took nothing of trial %s: %s", trial, error)
                return

    def _write_part(self, trial: str, part: _Part) -> None:
        run_id, status = self._runs.get(trial, ("", ""))
        params = part.params if not run_id else None
        if not run_id:
            tags = {"lepton_ray.kind": "trial", TRIAL: trial}
            run_id = self._tracker.start(f"trial {trial}", tags=tags, parent=self._parent)
        elif status != "RUNNING":
            self._tracker.reopen(run_id)
        self._runs[trial] = (run_id, "RUNNING")
        record = part.record
        last = [(len(record.values), record.metrics)] if record is not None else []
        logged = self._logged.setdefault(trial, set())
        metrics = []
        for epoch, values in [*part.metrics, *last]:
            new = {name: value for name, value in values.items() if (name, epoch) not in logged}
            logged |= {(name, epoch) for name in new}
            metrics.append((epoch, new))
        tags = _tags(record) if record is not None else {}
        self._tracker.batch(run_id, metrics=metrics, params=params or {}, tags=tags)
        if record is not None:
            if record.error:
                self._tracker.text(run_id, "error.txt", record.error)
            self._tracker.finish(run_id, STATUS[record.state])
            self._runs[trial] = (run_id, STATUS[record.state])
            del self._logged[trial]


def _tags(record: TrialRecord) -> dict[str, str]:
    tags: dict[str, str] = {"lepton_ray.state": record.state, KIND: record.kind}
    if record.reason:
        tags["lepton_ray.reason"] = record.reason
    if record.weights_sha256:
        tags["lepton_ray.weights_sha256"] = record.weights_sha256
    return tags
