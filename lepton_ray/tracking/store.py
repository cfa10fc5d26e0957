"""Runs in MLflow, written by one process in batches.

SQLite takes one writer at a time, so replicas and trials never write: their events reach the
driver, and it writes here.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from lepton_ray.errors import StoreError

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
DEFAULT_URI = f"{SQLITE}mlflow.db"
FLUSH_S = 1.0
BATCH = 900  # MLflow takes 1000 metrics and 100 parameters in one call
PARAM_CHARS = 6000  # of one value; MLflow's own limit

Status = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, else a SQLite file in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri() -> str:
    """The same for a process in another folder."""
    uri = tracking_uri()
    path = _file(uri)
    return uri if path is None else f"{SQLITE}{path.resolve()}"


_opened: set[str] = set()  # by this process, without an error


def client() -> MlflowClient:
    """A client of the store; artifacts are never unpickled.

    Raises:
        StoreError: when the store cannot be opened or written.
    """
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    uri = tracking_uri()
    _check_writable(uri)
    try:
        mlflow.set_tracking_uri(uri)
        store = MlflowClient(uri)
        if uri not in _opened:
            store.search_experiments(max_results=1)
            _opened.add(uri)
    except (MlflowException, OSError, ImportError) as error:
        raise StoreError(
            f"the MLflow store {uri} cannot be used: {_first_line(error)}; set MLFLOW_TRACKING_URI"
        ) from error
    return store


def check() -> None:
    """That runs could be recorded, without making a database where there is none.

    Raises:
        StoreError: when the store cannot be opened or written.
    """
    uri = tracking_uri()
    path = _file(uri)
    if path is None or path.exists():
        client()
    else:
        _check_writable(uri)


def top_level_runs(name: str | None, most: int) -> list[Any]:
    """The newest runs that are no trials, each tagged with its experiment's name.

    Args:
        name: of an experiment; all of them by default.
    """
    store = client()
    names = {e.experiment_id: e.name for e in store.search_experiments()}
    chosen = [i for i, n in names.items() if name is None or n == name]
    if not chosen:
        return []
    found = store.search_runs(
        chosen,
        "tags.`lepton_ray.kind` != 'trial'",
        max_results=most,
        order_by=["attributes.start_time DESC"],
    )
    for run in found:
        run.data.tags["lepton_ray.experiment"] = names[run.info.experiment_id]
    return list(found)


def _file(uri: str) -> Path | None:
    """Of a store that is one."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def _check_writable(uri: str) -> None:
    path = _file(uri)
    if path is None:
        return
    target = path if path.exists() else path.parent
    if not target.exists():
        raise StoreError(f"the MLflow store {uri} cannot be used: {target} does not exist")
    if target.is_dir() and path.exists():
        raise StoreError(f"the MLflow store {uri} cannot be used: {path} is a folder")
    if not os.access(target, os.W_OK):
        raise StoreError(
            f"the MLflow store {uri} cannot be used: {target} is not writable; set "
            "MLFLOW_TRACKING_URI to one that is"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Tracker:
    """The runs of one MLflow experiment.

    Args:
        artifacts: folder for the artifacts of a store that has no server.
    """

    def __init__(self, name: str, artifacts: Path) -> None:
        self.client = client()
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise StoreError(
                f"the MLflow experiment {name!r} was deleted: restore it, or set another name"
            )
        if found is not None:
            self.experiment_id = found.experiment_id
        else:
            local = tracking_uri().startswith("sqlite:")
            location = (artifacts / name).resolve().as_uri() if local else None
            self.experiment_id = self.client.create_experiment(name, artifact_location=location)
        self._buffered: dict[str, list[Metric]] = {}
        self._flushed_at = time.monotonic()

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> str:
        """A new run's id."""
        all_tags = {**(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
        run_id: str = self.client.create_run(
            self.experiment_id, run_name=name, tags=all_tags
        ).info.run_id
        items = [Param(k, _text(v)) for k, v in (params or {}).items()]
        for first in range(0, len(items), 100):
            self.client.log_batch(run_id, params=items[first : first + 100])
        return run_id

    def reopen(self, run_id: str) -> None:
        """Mark a run of an earlier process as running again."""
        self.client.update_run(run_id, status="RUNNING")

    def children(self, parent: str, tag: str) -> dict[str, tuple[str, str]]:
        """Runs below ``parent`` by the value of a tag: id and status."""
        found: dict[str, tuple[str, str]] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", page_token=token
            )
            found |= {r.data.tags[tag]: (r.info.run_id, r.info.status) for r in page}
            token = page.token
            if not token:
                return found

    def steps(self, run_id: str, names: Sequence[str]) -> dict[str, set[int]]:
        """At which steps a run has a value of each metric."""
        return {
            name: {m.step for m in self.client.get_metric_history(run_id, name)} for name in names
        }

    def batch(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[int, Mapping[str, float]]],
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        """Record numbers (step, values), settings and tags at once, in as few calls as MLflow
        allows."""
        now = int(time.time() * 1000)
        numbers = [
            Metric(name, value, now, step)
            for step, values in metrics
            for name, value in values.items()
            if math.isfinite(value)
        ]
        items = [Param(k, _text(v)) for k, v in params.items()]
        labels = [RunTag(k, v) for k, v in tags.items()]
        while numbers or items or labels:
            self.client.log_batch(
                run_id, metrics=numbers[:BATCH], params=items[:100], tags=labels, synchronous=True
            )
            numbers, items, labels = numbers[BATCH:], items[100:], []

    def metrics(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        """Record numbers; they reach the store within a second or with `finish`.

        A store that cannot be written just now gets them later: what is measured goes on.
        """
        now = int(time.time() * 1000)
        self._buffered.setdefault(run_id, []).extend(
            Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)
        )
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            try:
                self.flush()
            except (MlflowException, OSError) as error:
                self._flushed_at = time.monotonic()
                logger.warning("metrics are kept for later: %s", _first_line(error))

    def flush(self) -> None:
        """Write what is buffered."""
        for run_id in list(self._buffered):
            metrics = self._buffered[run_id]
            while metrics:
                self.client.log_batch(run_id, metrics=metrics[:BATCH])
                del metrics[:BATCH]
            del self._buffered[run_id]
        self._flushed_at = time.monotonic()

    def recorded(self, run_id: str) -> int:
        """The last epoch of a training whose metrics the store has."""
        history = self.client.get_metric_history(run_id, "train_loss")
        return max((metric.step for metric in history), default=0)

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def text(self, run_id: str, name: str, content: str) -> None:
        """Record a small file."""
        self.client.log_text(run_id, content, name)

    def files(self, run_id: str, folder: Path, name: str) -> None:
        """Record all files of a folder."""
        self.client.log_artifacts(run_id, str(folder), name)

    def finish(self, run_id: str, status: Status = "FINISHED") -> None:
        self.flush()
        self.client.set_terminated(run_id, status)


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 3] + "..."
