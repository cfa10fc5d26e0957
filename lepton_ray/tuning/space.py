"""The search space as values: dotted paths of settings and where to look."""

from __future__ import annotations

import inspect
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lepton_ray import models
from lepton_ray.config import flatten, settings_of, with_settings
from lepton_ray.config.schema import Distribution, Experiment
from lepton_ray.errors import ExperimentError, nearest
from lepton_ray.training.optimization import optimizer_parameters


def distributions(space: dict[str, Distribution]) -> dict[str, BaseDistribution]:
    """The space in Optuna's words."""
    return {path: _distribution(where) for path, where in space.items()}


def _distribution(where: Distribution) -> BaseDistribution:
    if where.choice is not None:
        return CategoricalDistribution(where.choice)
    if where.randint is not None:
        return IntDistribution(*where.randint)
    if where.loguniform is not None:
        return FloatDistribution(*where.loguniform, log=True)
    if where.quniform is not None:
        low, high, step = where.quniform
        return FloatDistribution(low, high, step=step)
    assert where.uniform is not None
    return FloatDistribution(*where.uniform)


def own_values(experiment: Experiment) -> dict[str, Any]:
    """What the experiment itself says for the searched settings: the study's first trial.

    A setting the file leaves to the model's default is taken from there; one that lies outside the
    space is left to the searcher.
    """
    assert experiment.tune is not None
    given = flatten(experiment.model_dump(mode="json"))
    given["train.shards"] = experiment.train.n_shards
    defaults = models.parameters(experiment.model.name) or {}
    values = {}
    for path, where in experiment.tune.space.items():
        default = defaults.get(path.removeprefix("model."), inspect.Parameter.empty)
        value = given.get(path, default)
        if value is inspect.Parameter.empty or value is None:
            continue
        if _contains(where, value):
            values[path] = value
    return values


def _contains(where: Distribution, value: Any) -> bool:
    if where.choice is not None:
        return value in where.choice
    low, high = where.corners
    return isinstance(value, int | float) and low <= value <= high


def check(experiment: Experiment) -> None:
    """Every path names a setting, and the ends of every distribution are allowed.

    Raises:
        ExperimentError: with every problem found.
    """
    assert experiment.tune is not None
    taken = models.parameters(experiment.model.name)
    optimizer = {
        f"train.optimizer.{name}" for name in optimizer_parameters(experiment.train.optimizer.name)
    }
    known = {p for p in settings_of(Experiment) if p.startswith("train.")} | optimizer
    known |= {f"model.{name}" for name in taken or ()}
    problems = []
    for path, where in experiment.tune.space.items():
        free = taken is None and path.startswith("model.")
        if path not in known and not free:
            problems.append(f"tune.space: {path!r} names no setting, {nearest(path, known)}")
            continue
        for value in where.corners:
            try:
                with_settings(experiment, {path: value})
            except ExperimentError as error:
                problems += [f"tune.space.{path}: {value!r}: {p}" for p in error.problems]
    if problems:
        raise ExperimentError(experiment.name, problems)
