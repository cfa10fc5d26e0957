"""Run a study with Ray Tune, or go on with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import StudyError
from lepton_ray.tuning.journal import Journal, TrialRecord
from lepton_ray.tuning.searcher import OptunaSearcher
from lepton_ray.tuning.space import distributions, own_values
from lepton_ray.tuning.trial import Trial

OnEvent = Callable[[dict[str, Any]], None]
REDUCTION = 3  # a rung keeps the best third


def run(
    experiment: Experiment,
    dataset: ray.ObjectRef[Dataset],
    *,
    folder: Path,
    on_event: OnEvent = lambda event: None,
) -> tuple[TrialRecord, Journal]:
    """The best trial and all trials; resumes from ``folder``.

    Args:
        dataset: reference to a `Dataset` in the object store.
        folder: the study's folder.
        on_event: called in this thread when a trial starts, reports or ends.

    Raises:
        StudyError: when no trial finished.
    """
    settings = experiment.tune
    assert settings is not None
    journal = Journal(folder)
    remaining = settings.trials - len(journal.finished)
    if remaining > 0:
        searcher = OptunaSearcher(
            settings, distributions(settings.space), journal, own_values(experiment)
        )
        _tune(experiment, dataset, searcher, journal, remaining, folder, on_event)
    best = journal.best(settings.mode)
    if best is None:
        errors = [r.error for r in journal.finished if r.error]
        raise StudyError(
            f"none of {len(journal.finished)} trials finished"
            + (f"; the last one's error:\n{errors[-1]}" if errors else "")
        )
    return best, journal


def _tune(
    experiment: Experiment,
    dataset: ray.ObjectRef[Dataset],
    searcher: OptunaSearcher,
    journal: Journal,
    trials: int,
    folder: Path,
    on_event: OnEvent,
) -> None:
    settings, workers = experiment.tune, experiment.workers
    assert settings is not None
    # Tune reads these when the run is made. Its own loggers write three files a result, and cost
    # more than a short trial.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would swallow every later Ctrl-C
    trainable = tune.with_parameters(
        Trial, experiment=experiment.model_dump(mode="json"), dataset=[dataset]
    )
    resources = {"cpu": workers.cpus, **({"gpu": workers.gpus} if workers.gpus else {})}
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(experiment),
            num_samples=trials,
            max_concurrent_trials=settings.parallel or room(workers.cpus, workers.gpus),
            reuse_actors=True,
            time_budget_s=settings.budget.minutes * 60 if settings.budget else None,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=str(folder.resolve()),
            callbacks=[_Events(journal, on_event)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()


def _scheduler(experiment: Experiment) -> TrialScheduler:
    settings = experiment.tune
    assert settings is not None
    searched = settings.space.get("train.epochs")
    epochs = int(max(searched.corners)) if searched else experiment.train.epochs
    if settings.scheduler == "none" or epochs == 1:
        return FIFOScheduler()
    return ASHAScheduler(
        metric=settings.metric,
        mode=settings.mode,
        max_t=epochs,
        grace_period=1,
        reduction_factor=REDUCTION,
    )


def room(cpus: float, gpus: float) -> int:
    """How many trials the cluster has room for now."""
    total = ray.cluster_resources()
    by_cpu = int(total.get("CPU", 0) // cpus)
    by_gpu = int(total.get("GPU", 0) // gpus) if gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))


class _Events(tune.Callback):
    """Turns Tune's callbacks into events; the searcher has written the journal before."""

    def __init__(self, journal: Journal, on_event: OnEvent) -> None:
        self._journal = journal
        self._on_event = on_event

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks to restore a study, which the journal does here, and
        who listens may hold a terminal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_event({"kind": "trial_start", "trial": trial.trial_id, "params": trial.config})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = {k: v for k, v in result.items() if k.startswith(("val_", "train_"))}
        self._on_event(
            {
                "kind": "trial_result",
                "trial": trial.trial_id,
                "epoch": result["training_iteration"],
                "metrics": metrics,
            }
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)

    def _end(self, trial: Any) -> None:
        record = next(r for r in self._journal.finished if r.id == trial.trial_id)
        self._on_event({"kind": "trial_end", "trial": record.id, "record": record})
