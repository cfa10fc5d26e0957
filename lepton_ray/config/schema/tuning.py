"""What a study searches, how trials are stopped, and how much it may spend."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from lepton_ray.config.schema.section import Section

LESS_IS_BETTER = ("loss", "mae", "rmse", "_ms", "parameters", "seconds")
"""How the names of metrics end of which less is better; of all others, more is."""
MEASURED_BY_TRIALS = ("parameters", "latency_ms", "seconds")
"""What a trial measures besides its epochs: weights of the model, milliseconds for one row through
the exported model, and seconds of its training."""
KINDS = ("uniform", "loguniform", "quniform", "randint", "choice")


class Distribution(Section):
    """Exactly one of the first five; ranges include both ends."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None
    randint: tuple[int, int] | None = None
    choice: tuple[Any, ...] | None = None
    when: dict[str, Any] | None = None
    """Searched only in trials where these settings have these values (or one of a list): dotted
    path -> value. In the others it is as the experiment says."""

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} must be given, got {given}")
        if self.choice is not None and len(self.choice) == 0:
            raise ValueError("choice must list at least one value")
        if self.choice is None:
            low, high, *step = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"low < high must hold, but got {low} and {high}")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform must start above 0, but got {low}")
            if step and step[0] <= 0:
                raise ValueError(f"the step of quniform must be above 0, but got {step[0]}")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        """What is given; the others would only clutter the file."""
        return {n: v for n in type(self).model_fields if (v := getattr(self, n)) is not None}

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that show whether a whole distribution is allowed: its ends, or each choice."""
        if self.choice is not None:
            return self.choice
        (limits,) = (v for kind in KINDS if (v := getattr(self, kind)) is not None)
        return tuple(limits[:2])

    def allowed(self, path: str) -> tuple[Any, ...]:
        """The values of ``path`` under which this is searched."""
        value = (self.when or {})[path]
        return tuple(value) if isinstance(value, list | tuple) else (value,)


class Budget(Section):
    """No trial starts beyond it, and running ones are stopped; the best so far is kept."""

    minutes: float | None = Field(None, gt=0)
    """Of the study's own time, over all its processes."""
    usd: float | None = Field(None, gt=0)
    """Price of the cluster's nodes while the study runs."""
    usd_per_hour: float | None = Field(None, gt=0)
    """Of one node. Default: by the type of each node, from the table in jobs/prices.yaml."""

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.minutes is None and self.usd is None:
            raise ValueError("a budget needs minutes or usd")
        return self


class Bound(Section):
    """Limits of a metric; trials beyond them are never the best."""

    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Bound:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a constraint needs at_most or at_least")
        return self

    def excess(self, value: float) -> float:
        """How far beyond the limits; at most 0 within them."""
        beyond = [] if self.at_most is None else [value - self.at_most]
        beyond += [] if self.at_least is None else [self.at_least - value]
        return max(beyond)


class Confirm(Section):
    """The best trials are trained again with new seeds, and the best on average wins."""

    top: int = Field(3, ge=1)
    seeds: int = Field(2, ge=1)


class Population(Section):
    """Population based training (``searcher: pbt``)."""

    size: int = Field(4, ge=2)
    every: int = Field(1, ge=1)
    """Epochs between two generations. After each, the worse quarter goes on from checkpoints of
    the better quarter, with settings a little off theirs."""


class Tune(Section):
    metric: str | tuple[str, ...] = "val_loss"
    """What is searched for; with several, the trials that none beats in all of them."""
    mode: Literal["min", "max"] | tuple[Literal["min", "max"], ...] | None = None
    """Default: by the metric's name."""
    trials: int = Field(16, ge=1)
    parallel: int | None = Field(None, ge=1)
    """Trials at a time. Default: as many as the cluster has room for."""
    workers: int = Field(1, ge=1)
    """Replicas that train one trial; the result does not depend on it."""
    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted path of a setting -> where to look; sections may be nested."""
    searcher: Literal["tpe", "multivariate_tpe", "random", "grid", "gp", "cmaes", "pbt"] = "tpe"
    """``tpe`` looks at one setting at a time, ``multivariate_tpe`` at all together."""
    scheduler: Literal["asha", "hyperband", "median", "none"] | None = None
    """Which trials are stopped early. ``asha``: those among the worse two thirds after a ninth and
    after a third of the epochs, unless they began as well as a good one did; ``hyperband``: the
    same, and a part of the trials is judged later; ``median``: those worse than the median of the
    others. Default: ``asha`` for one metric, ``none`` for several."""
    population: Population = Population()
    constraints: dict[str, Bound] = {}
    """Metric -> limits."""
    goal: float | None = None
    """The study ends once a finished trial is this good in the (first) metric."""
    confirm: Confirm | None = None
    seed: int = Field(0, ge=0)
    budget: Budget | None = None
    keep: int = Field(3, ge=1)
    """Checkpoints of the best trials that stay."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> tuple[Literal["min", "max"], ...]:
        """One for each metric."""
        if self.mode is not None:
            return (self.mode,) if isinstance(self.mode, str) else self.mode
        return tuple("min" if m.endswith(LESS_IS_BETTER) else "max" for m in self.metrics)

    @property
    def rule(self) -> str:
        """The scheduler, with its default."""
        if self.searcher == "pbt":
            return "none"
        return self.scheduler or ("asha" if len(self.metrics) == 1 else "none")

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, space: Any) -> Any:
        return _flatten(space, "") if isinstance(space, dict) else space

    @field_validator("space")
    @classmethod
    def _paths(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        for path in space:
            if path.split(".")[0] not in ("model", "train"):
                raise ValueError(
                    f"{path!r} cannot be searched: a path starts with model. or train. (the data "
                    "are read once, for all trials)"
                )
        return space

    @model_validator(mode="after")
    def _across(self) -> Tune:
        if len(self.modes) != len(self.metrics):
            raise ValueError(
                f"mode must have one entry for each metric, but got {len(self.modes)} for "
                f"{len(self.metrics)}: leave mode out, or list {len(self.metrics)}"
            )
        several = len(self.metrics) > 1
        if several and self.scheduler not in (None, "none"):
            raise ValueError(
                f"scheduler {self.scheduler!r} ranks trials by one metric, but got "
                f"{len(self.metrics)}: leave scheduler out"
            )
        if several and self.searcher in ("cmaes", "pbt"):
            raise ValueError(
                f"searcher {self.searcher!r} takes one metric, but got {len(self.metrics)}: use "
                "tpe, gp, random or grid"
            )
        if self.searcher == "pbt" and self.confirm is not None:
            raise ValueError(
                "confirm trains settings again, but searcher pbt changes them on the way: leave "
                "confirm out"
            )
        if self.searcher == "pbt" and self.scheduler not in (None, "none"):
            raise ValueError(
                f"searcher pbt replaces what is bad itself, but got scheduler {self.scheduler!r}: "
                "leave scheduler out"
            )
        return self


def _flatten(space: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in space.items():
        nested = isinstance(value, dict) and value and not ({*KINDS, "when"} & value.keys())
        if nested and all(isinstance(inner, dict) for inner in value.values()):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
