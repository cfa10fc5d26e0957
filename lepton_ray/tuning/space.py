"""The search space as values: dotted paths of settings, where to look, under which conditions."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
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
from lepton_ray.config.schema.tuning import MEASURED_BY_TRIALS
from lepton_ray.data.pretrained import is_pretrained
from lepton_ray.errors import ExperimentError, nearest

Space = Mapping[str, Distribution]
NEAR = 1e-8  # as Optuna has it, of a number that is a whole number of steps
MOVABLE = ("train.optimizer.", "train.clip")
"""Settings that may change in the middle of a training: no shape and no order depends on them."""


def distribution(where: Distribution) -> BaseDistribution:
    """One setting's range in Optuna's words."""
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


def in_order(space: Space) -> list[str]:
    """Paths so that what a condition names comes before what depends on it."""
    ordered: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [p for p in waiting if not set(space[p].when or {}) & set(waiting)]
        if not ready:
            break  # `check` refuses a circle
        ordered += ready
        waiting = [p for p in waiting if p not in ready]
    return ordered


def is_active(where: Distribution, params: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether a setting is searched in a trial with these others.

    Args:
        fixed: what the experiment says for settings that are not searched.
    """
    return all(
        (params[path] if path in params else fixed.get(path)) in where.allowed(path)
        for path in where.when or {}
    )


def values_of(where: Distribution) -> list[Any] | None:
    """All values of a distribution, None when there is no end to them."""
    if where.choice is not None:
        return list(where.choice)
    if where.randint is not None:
        return list(range(where.randint[0], where.randint[1] + 1))
    if where.quniform is not None:
        low, high, step = where.quniform
        count = int((high - low) / step + 1e-9) + 1
        return [low + n * step for n in range(count)]
    return None


def grid(space: Space, fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination once, the last path changing fastest."""

    def expand(paths: list[str], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not paths:
            yield params
            return
        path, *rest = paths
        if not is_active(space[path], params, fixed):
            yield from expand(rest, params)
            return
        for value in values_of(space[path]) or []:
            yield from expand(rest, {**params, path: value})

    yield from expand(in_order(space), {})


def settings(experiment: Experiment) -> dict[str, Any]:
    """What the experiment says for every setting, also where it leaves it to a default."""
    given = flatten(experiment.model_dump(mode="json", exclude={"tune"}))
    given["train.shards"] = experiment.train.n_shards
    for name, default in (models.parameters(experiment.model.name) or {}).items():
        if default is not inspect.Parameter.empty:
            given.setdefault(f"model.{name}", default)
    return given


def own_values(experiment: Experiment) -> dict[str, Any]:
    """What the experiment itself says for the searched settings: the study's first trial.

    A setting the file leaves to the model's default is taken from there; one that lies outside the
    space is left to the searcher.
    """
    assert experiment.tune is not None
    given = settings(experiment)
    return {
        path: given[path]
        for path, where in experiment.tune.space.items()
        if given.get(path) is not None and contains(where, given[path])
    }


def contains(where: Distribution, value: Any) -> bool:
    """Whether a value lies in the distribution."""
    if where.choice is not None:
        return value in where.choice
    low, high = where.corners
    if not isinstance(value, int | float) or not low <= value <= high:
        return False
    if where.randint is not None:
        return float(value).is_integer()
    if where.quniform is not None:
        steps = (value - low) / where.quniform[2]
        return bool(abs(steps - round(steps)) < NEAR)
    return True


def differences(ours: Space, theirs: Space) -> list[str]:
    """How two spaces differ, one line for each setting."""
    found = []
    for path in sorted({*ours, *theirs}):
        one, other = ours.get(path), theirs.get(path)
        if one is None or other is None:
            found.append(
                f"{path} was searched, and is not now" if one is None else f"{path} is new"
            )
        elif one != other:
            found.append(f"{path} is {one.model_dump()} now and was {other.model_dump()}")
    return found


def check(experiment: Experiment) -> None:
    """Every path names a setting, the ends of every distribution are allowed, and every condition
    can hold.

    Raises:
        ExperimentError: with every problem found.
    """
    tune = experiment.tune
    assert tune is not None
    problems = []
    circle = set(tune.space) - set(in_order(tune.space))
    if circle:
        problems.append(
            f"tune.space: the conditions of {', '.join(sorted(circle))} wait for each other: take "
            "one `when` out"
        )
    fixed = settings(experiment)
    for path, where in tune.space.items():
        broken = [] if path in circle else _broken_conditions(path, tune.space, fixed)
        problems += broken
        if path in circle or broken:
            continue
        under = {p: where.allowed(p)[0] for p in where.when or {}}
        unknown = _unknown(path, experiment, under)
        if unknown:
            problems.append(unknown)
            continue
        for value in where.corners:
            try:
                with_settings(experiment, {**under, path: value})
            except ExperimentError as error:
                problems += [f"tune.space.{path}: {value!r}: {p}" for p in error.problems]
        names = [experiment.model.name, *map(str, where.choice or ())]
        if path == "model.name" and len(set(names)) > 1 and any(map(is_pretrained, names)):
            problems.append(
                "tune.space.model.name: a model hf:NAME has a tokenizer of its own, and the trials "
                f"of a study share one, but got {', '.join(sorted(set(names)))}: make a study of "
                "each"
            )
        if tune.searcher == "grid" and values_of(where) is None:
            problems.append(
                f"tune.space.{path}: searcher grid tries all values, but these have no end: use "
                "choice, randint or quniform, or another searcher"
            )
        if tune.searcher == "pbt" and not path.startswith(MOVABLE):
            problems.append(
                f"tune.space.{path}: searcher pbt changes settings in the middle of a training, "
                f"where only {' and '.join(m + ('*' if m.endswith('.') else '') for m in MOVABLE)} "
                "can: take it out, or use another searcher"
            )
        if tune.searcher == "pbt" and (where.when or path == "train.optimizer.name"):
            problems.append(
                f"tune.space.{path}: searcher pbt moves settings of a training that goes on: its "
                "optimizer stays, and conditions are not asked; take it out, or use another "
                "searcher"
            )
    if problems:
        raise ExperimentError(experiment.name, problems)


def check_metrics(experiment: Experiment, reported: Iterable[str]) -> None:
    """What the study looks at is measured.

    Args:
        reported: what each epoch reports.

    Raises:
        ExperimentError: with every problem found.
    """
    tune = experiment.tune
    assert tune is not None
    each_epoch = set(reported)
    known = each_epoch | set(MEASURED_BY_TRIALS)
    problems = [
        f"tune.{section}: {name!r} is never reported, {nearest(name, known)}"
        for section, names in (("metric", tune.metrics), ("constraints", tuple(tune.constraints)))
        for name in names
        if name not in known
    ]
    first = tune.metrics[0]
    if first in known - each_epoch:
        problems.append(
            f"tune.metric: {first!r} is measured once, at a trial's end, and the first metric must "
            f"be one of each epoch: put one of {', '.join(sorted(each_epoch))} before it"
        )
    if problems:
        raise ExperimentError(experiment.name, problems)


def _broken_conditions(path: str, space: Space, fixed: Mapping[str, Any]) -> list[str]:
    problems = []
    for named in space[path].when or {}:
        allowed = space[path].allowed(named)
        where = space.get(named)
        if where is None and named not in fixed:
            problems.append(
                f"tune.space.{path}.when: {named!r} names no setting, {nearest(named, fixed)}"
            )
            continue
        possible = [v for v in allowed if contains(where, v)] if where else [fixed[named]]
        if not set(map(repr, possible)) & set(map(repr, allowed)):
            is_now = f"searched over {where.model_dump()}" if where else repr(fixed[named])
            problems.append(
                f"tune.space.{path}.when: {named} can never be "
                f"{' or '.join(map(repr, allowed))}, it is {is_now}: change the condition or that"
            )
    return problems


def _unknown(path: str, experiment: Experiment, under: Mapping[str, Any]) -> str:
    """What is wrong with the name of a path, where ``under`` holds."""
    from lepton_ray.training.optimization import optimizer_parameters  # and torch, which takes 2 s

    name = under.get("model.name", experiment.model.name)
    taken = models.parameters(name)
    optimizer = under.get("train.optimizer.name", experiment.train.optimizer.name)
    known = {p for p in settings_of(Experiment) if p.startswith("train.")}
    known |= {f"train.optimizer.{n}" for n in optimizer_parameters(optimizer)}
    known |= {f"model.{n}" for n in (*(taken or ()), "name")}
    if path in known or (taken is None and path.startswith("model.")):
        return ""
    return f"tune.space: {path!r} names no setting, {nearest(path, known)}"
