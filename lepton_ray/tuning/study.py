"""Run a study with Ray Tune, or go on with one.

Tune gives out trials, keeps their actors warm and tells what they report. What is decided on that
is decided in `decisions`, and written to the journal, before Tune hears of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lepton_ray import storage
from lepton_ray.config.schema import Experiment, Tune, Workers
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import StudyError
from lepton_ray.tuning import population, results
from lepton_ray.tuning.decisions import Decisions
from lepton_ray.tuning.journal import Journal, Prior, TrialRecord, trial_id
from lepton_ray.tuning.trial import Measure, Trial

logger = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]
TRIES_OF_A_LOST_PROCESS = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    best: TrialRecord
    journal: Journal
    checkpoint: str
    """Folder of the best trial's checkpoints."""
    reason: str
    """Why the study ended; empty when all trials were done."""


def run(
    experiment: Experiment,
    dataset: ray.ObjectRef[Dataset],
    *,
    folder: Path,
    checkpoints: str | None = None,
    more: int = 0,
    priors: Sequence[Prior] = (),
    measures: Mapping[str, Measure] | None = None,
    usd_per_hour: Callable[[], float] = lambda: 0.0,
    on_event: OnEvent = lambda event: None,
) -> Result:
    """Search until all trials are done, the goal is reached or the budget is spent.

    Args:
        dataset: reference to a `Dataset` in the object store.
        folder: the study's folder; a journal in it is gone on with.
        checkpoints: folder or URI that every trial reaches; default in ``folder``.
        more: trials beyond ``tune.trials``.
        priors: what earlier studies found.
        measures: by name, what is measured of each finished trial's model.
        usd_per_hour: of the cluster as it is when asked, for a budget in dollars.
        on_event: called in this thread when the journal is open, and when a trial starts, reports
            or ends.

    Raises:
        StudyError: when no trial gave a value.
    """
    settings = experiment.tune
    assert settings is not None
    checkpoints = checkpoints or str(folder.resolve() / "checkpoints")
    if not storage.is_uri(checkpoints):
        checkpoints = str(Path(checkpoints).resolve())
    journal = Journal(folder)
    decisions = Decisions(experiment, journal, more=more, priors=priors, usd_per_hour=usd_per_hour)
    edge = _Edge(decisions, checkpoints, on_event)
    on_event({"kind": "opened", "journal": journal})
    if not decisions.complete:
        _tune(experiment, dataset, edge, folder, checkpoints, measures or {})
        if edge.failure is not None:
            raise edge.failure
        for number in journal.unfinished:  # stopped by the budget or the goal
            edge.end(number, {}, reason=decisions.reason or "the study ended")
    journal.close(decisions.reason or "all trials are done")
    best = results.best(settings, journal.finished)
    if best is None:
        why = results.commonest_error(journal.finished) or decisions.reason
        raise StudyError(
            f"none of {len(journal.finished)} trials finished" + (f"; {why}" if why else "")
        )
    return Result(
        best=best,
        journal=journal,
        checkpoint=f"{checkpoints}/{best.id}",
        reason=decisions.reason,
    )


def room(tune_settings: Tune, workers: Workers) -> int:
    """How many trials the cluster has room for now."""
    total = ray.cluster_resources()
    each = tune_settings.workers
    by_cpu = int(total.get("CPU", 0) // (workers.cpus * each))
    by_gpu = int(total.get("GPU", 0) // (workers.gpus * each)) if workers.gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))


def _tune(
    experiment: Experiment,
    dataset: ray.ObjectRef[Dataset],
    edge: _Edge,
    folder: Path,
    checkpoints: str,
    measures: Mapping[str, Measure],
) -> None:
    settings, workers = experiment.tune, experiment.workers
    assert settings is not None
    # Tune reads these when the run is made. Its own loggers write three files a result, and cost
    # more than a short trial; its own state of the study is never read, the journal is.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would swallow every later Ctrl-C
    trainable = tune.with_parameters(
        Trial,
        experiment=experiment.model_dump(mode="json"),
        dataset=[dataset],
        checkpoints=checkpoints,
        measures=dict(measures),
    )
    each = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    group = tune.PlacementGroupFactory([dict(each) for _ in range(settings.workers)])
    tuner = tune.Tuner(
        tune.with_resources(trainable, group),
        tune_config=tune.TuneConfig(
            search_alg=_Search(edge),
            scheduler=_Schedule(edge),
            num_samples=-1,  # until the searcher says that it is over
            max_concurrent_trials=settings.parallel or room(settings, workers),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"ray_tune-{time.time_ns()}",
            storage_path=str(folder.resolve()),
            stop=_Stop(edge),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=TRIES_OF_A_LOST_PROCESS),
            verbose=0,
        ),
    )
    # It looks for files of results that are not written, and tells each.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    with _prepared_processes():
        tuner.fit()


@contextlib.contextmanager
def _prepared_processes() -> Iterator[None]:
    """Let trials have the processes that Ray has started already.

    Tune gives its actors variables of an environment, keys of AWS among them, so that none of those
    processes fits: each start is a cold one, and all who have the token can read the keys. These
    are private names of Ray 2.60, which is pinned; a test fails when they go away.
    """
    kept = class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = {}, set()
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = kept


class _Edge:
    """Where Tune's calls become decisions and events."""

    def __init__(self, decisions: Decisions, checkpoints: str, on_event: OnEvent) -> None:
        self.decisions = decisions
        self.failure: StudyError | None = None
        self._on_event = on_event
        self._fs, self._root = storage.open_folder(checkpoints)
        self._dropped: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles all that it is given, to restore a study, which the journal does
        here; and who listens may hold a terminal."""
        return {}

    def start(self) -> dict[str, Any] | str | None:
        """The next trial as a configuration of Tune."""
        found = self.decisions.next()
        if isinstance(found, str):
            return None if found == "wait" else Searcher.FINISHED
        is_member = found.kind == "member"
        tune_settings, epochs = self.decisions.tune, self.decisions.epochs
        rule, size = self.decisions.rule, tune_settings.population.size
        decide = (
            [e for e in range(1, epochs) if rule.decides_at(found.number, e)]
            if found.kind == "search"
            else []
        )
        self._on_event({"kind": "trial_start", "trial": found.id, "params": found.params})
        return {
            "trial": found.number,
            "settings": found.params,
            "parent": found.parent,
            "after": population.last_epoch(tune_settings, found.number - size, epochs)
            if found.parent is not None
            else 0,
            "epochs": population.last_epoch(tune_settings, found.number, epochs)
            if is_member
            else None,
            "decide": decide,
        }

    def result(self, number: int, result: Mapping[str, Any]) -> str:
        """Epochs that a trial tells: "" or the reason to stop it."""
        rows, stop = result.get("epochs", []), ""
        for offset, metrics in enumerate(rows):
            epoch = result["first"] + offset
            known = len(self.decisions.journal.reports[number])
            last = bool(result.get("finished")) and offset == len(rows) - 1
            try:
                stop = self.decisions.report(number, epoch, metrics, last=last)
            except StudyError as error:
                self.failure = self.failure or error
                return str(error)
            if len(self.decisions.journal.reports[number]) > known:
                event = {"kind": "trial_result", "trial": trial_id(number), "epoch": epoch}
                self._on_event({**event, "metrics": metrics})
            if stop:
                break
        return stop

    def end(self, number: int, result: Mapping[str, Any], *, reason: str = "") -> None:
        """A trial that ended, with its last result."""
        if number in self.decisions.journal.ended:
            return
        rows = result.get("epochs", [])
        record = self.decisions.end(
            number,
            finished=bool(result.get("finished")),
            metrics={**(rows[-1] if rows else {}), **dict(result.get("measured", ()))},
            seconds=float(result.get("seconds", 0.0)),
            error=str(result.get("error", "")),
            weights_sha256=str(result.get("weights_sha256", "")),
            reason=reason,
        )
        self._on_event({"kind": "trial_end", "trial": record.id, "record": record})
        self._drop_checkpoints()

    def _drop_checkpoints(self) -> None:
        """Keep those of the best trials, and those that others may go on from."""
        journal, settings = self.decisions.journal, self.decisions.tune
        best = results.ranked(settings, journal.finished)[: settings.keep]
        stay = {r.number for r in best}
        is_population = settings.searcher == "pbt"
        parents_from = len(journal.starts) - 2 * settings.population.size
        for number in journal.ended.keys() - stay - self._dropped:
            if is_population and number >= parents_from:
                continue
            self._dropped.add(number)
            _remove(self._fs, f"{self._root}/{trial_id(number)}")


class _Search(Searcher):
    """Asks for trials and tells how they ended."""

    def __init__(self, edge: _Edge) -> None:
        super().__init__()
        self._edge = edge
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        found = self._edge.start()
        if isinstance(found, dict):
            self._numbers[trial_id] = found["trial"]
        return found

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, result = self._numbers.pop(trial_id), result or {}
        if error:
            self._edge.end(number, {"error": "the trial's process died"})
            return
        self._edge.result(number, result)  # the last result comes only here
        self._edge.end(number, result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""


class _Schedule(FIFOScheduler):
    """Stops trials."""

    def __init__(self, edge: _Edge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._edge = edge

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = self._edge.result(trial.config["trial"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Nobody: Tune starts whoever waits. FIFO's choice would hand a process that became free
        to a trial whose own is about to be ready, and that one would be thrown away."""


class _Stop(tune.Stopper):
    """Ends all trials at once when the goal is reached, the budget spent or a metric missing."""

    def __init__(self, edge: _Edge) -> None:
        self._edge = edge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._edge.failure is not None or self._edge.decisions.is_over()


def _remove(filesystem: pafs.FileSystem, folder: str) -> None:
    try:
        if filesystem.get_file_info(folder).type == pafs.FileType.Directory:
            filesystem.delete_dir(folder)
    except OSError as error:
        logger.warning("cannot remove %s: %s", folder, error)
