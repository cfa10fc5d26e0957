"""What a study searches, and for how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from lepton_ray.config.schema.section import Section


class Distribution(Section):
    """Exactly one of these; ranges include both ends."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None
    randint: tuple[int, int] | None = None
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = list(self._given())
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(type(self).model_fields)} must be given, got {given}"
            )
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
        """The one that is given; the others would only clutter the file."""
        return {n: v for n in type(self).model_fields if (v := getattr(self, n)) is not None}

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that show whether a whole distribution is allowed: its ends, or each choice."""
        if self.choice is not None:
            return self.choice
        (limits,) = self._given().values()
        return tuple(limits[:2])


class Budget(Section):
    minutes: float = Field(gt=0)
    """No trial starts, and running ones are stopped, after this long."""


class Tune(Section):
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    trials: int = Field(16, ge=1)
    parallel: int | None = Field(None, ge=1)
    """Trials at a time. Default: as many as the cluster has room for."""
    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted path of a setting -> where to look."""
    searcher: Literal["tpe", "random"] = "tpe"
    scheduler: Literal["asha", "none"] = "asha"
    """``asha`` stops a trial that is among the worse two thirds at epochs 1, 3, 9, ..."""
    seed: int = Field(0, ge=0)
    budget: Budget | None = None

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
