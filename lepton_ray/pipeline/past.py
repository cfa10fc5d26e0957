"""What earlier studies found, from a run's folder or from MLflow, for a new study to learn from."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from lepton_ray.config import loads
from lepton_ray.config import schema as config
from lepton_ray.errors import InputError, nearest
from lepton_ray.jobs.recorder import KIND
from lepton_ray.jobs.runs import RunFolder, local_root
from lepton_ray.jobs.studies import JOURNAL, STUDY
from lepton_ray.tracking import store
from lepton_ray.tuning import status
from lepton_ray.tuning.journal import Journal, Prior
from lepton_ray.tuning.space import contains, settings

# What a result does not depend on, so that studies that differ in it compare.
NO_MATTER = ("train.checkpoint.", "train.digest_every", "train.tensorboard", "train.profile")


@dataclass(frozen=True, kw_only=True)
class PastTrial:
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class PastStudy:
    source: str
    fixed: Mapping[str, Any]
    """What its experiment said for every setting."""
    data_digest: str
    trials: Sequence[PastTrial]
    """Those that finished."""


def priors(experiment: config.Experiment, name: str | None, data_digest: str) -> list[Prior]:
    """What the study called ``name`` says about this experiment; nothing without a name.

    A trial's value counts where data and all settings that are not searched here are equal. Else
    only its settings are of use, the best first.

    Raises:
        InputError: when there is no such study, or nothing in it is of use.
    """
    if name is None:
        return []
    past = find(name, experiment)
    tune = experiment.tune
    assert tune is not None
    metric, sign = tune.metrics[0], 1 if tune.modes[0] == "min" else -1
    ours = settings(experiment)
    found = []
    for trial in past.trials:
        theirs = {**past.fixed, **trial.params}
        params = {
            path: theirs[path]
            for path, where in tune.space.items()
            if path in theirs and contains(where, theirs[path])
        }
        value = trial.metrics.get(metric, math.nan)
        same = past.data_digest == data_digest and all(
            ours.get(path) == theirs.get(path)
            for path in {*ours, *theirs}
            if path.startswith(("model.", "train."))
            and path not in tune.space
            and not path.startswith(NO_MATTER)
        )
        if params:
            comparable = same and math.isfinite(value)
            curve = list(trial.values) if comparable else []
            found.append(Prior(params, value, curve, comparable, past.source))
    if not found:
        raise InputError(
            f"--from-study {name}: {len(past.trials)} of its trials finished, and none has a "
            "setting that is searched here: leave --from-study out"
        )
    return sorted(found, key=lambda p: (math.isnan(p.value), sign * p.value))


def describe(found: Sequence[Prior], name: str) -> str:
    """What is taken from an earlier study, for a person."""
    count = sum(p.comparable for p in found)
    if count:
        return f"{count} finished trials of {name} count as known"
    return f"{name} was on other data or settings: the best of its settings are tried first"


def find(name: str, experiment: config.Experiment) -> PastStudy:
    """A study by the folder of its run, the name of its experiment, or its run in MLflow.

    Raises:
        InputError: when there is none.
    """
    for path in (Path(name), local_root(experiment.storage) / name):
        if status.exists(path / STUDY):
            return _from_folder(RunFolder.open(str(path)))
    folders = RunFolder.all_of(experiment.storage, name)
    for folder in folders:
        folder.fetch(JOURNAL)
    folders = [folder for folder in folders if status.exists(folder.path / STUDY)]
    if folders:
        return _from_folder(folders[-1])
    run = _mlflow_run(name)
    if run is not None:
        return _from_mlflow(run)
    root = local_root(experiment.storage)
    names = [p.name for p in root.iterdir() if p.is_dir()] if root.exists() else []
    raise InputError(
        f"no study {name!r}: neither the folder of a run, nor an experiment in {root}, nor a study "
        f"in {store.tracking_uri()}; {nearest(name, names)}"
    )


def _from_folder(folder: RunFolder) -> PastStudy:
    journal = Journal(folder.path / STUDY, read_only=True)
    trials = [
        PastTrial(params=r.params, metrics=r.metrics, values=r.values)
        for r in journal.finished
        if r.state == "finished" and r.kind == "search"
    ]
    return PastStudy(
        source=folder.uri,
        fixed=settings(folder.experiment()),
        data_digest=str(folder.recall("data_digest")),
        trials=trials,
    )


def _mlflow_run(name: str) -> Run | None:
    client = store.client()
    try:
        found: Run = client.get_run(name)
        return found
    except MlflowException:
        pass
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    studies = client.search_runs(
        [experiment.experiment_id], "tags.`lepton_ray.kind` = 'study'", max_results=1
    )
    return studies[0] if studies else None


def _from_mlflow(run: Run) -> PastStudy:
    client = store.client()
    experiment = run.info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    past = loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/experiment.yaml"))
    assert past.tune is not None
    metric = past.tune.metrics[0]
    trials = []
    for child in children:
        tags = child.data.tags
        if tags.get("lepton_ray.state") != "finished" or tags.get(KIND) != "search":
            continue
        history = client.get_metric_history(child.info.run_id, metric)
        trials.append(
            PastTrial(
                params=_plain(child.data.params),
                metrics=child.data.metrics,
                values=[m.value for m in sorted(history, key=lambda m: m.step)],
            )
        )
    return PastStudy(
        source=f"MLflow run {run.info.run_id}",
        fixed=settings(past),
        data_digest=run.data.tags.get("lepton_ray.data_digest", ""),
        trials=trials,
    )


def _plain(params: Mapping[str, str]) -> dict[str, Any]:
    """MLflow keeps texts."""
    found: dict[str, Any] = {}
    for name, text in params.items():
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
