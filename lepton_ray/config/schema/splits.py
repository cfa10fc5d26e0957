"""Which samples are for training, validation and the test."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lepton_ray.config.schema.section import Section, distinct


class Split(Section):
    test: Literal["given"] | Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the samples held out for the gate, or ``given``: the source brings its own."""
    column: str | None = None
    """The column of a table or of texts that says ``train`` or ``test`` of every row."""
    group: str | None = None
    """A column (a patient, a user) whose rows of one value stay together in one split."""
    time: str | None = None
    """A column of dates or numbers: the latest rows are the test, those before the validation."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the remaining samples that tuning and early stopping look at."""
    seed: int = Field(0, ge=0)

    @property
    def columns(self) -> set[str]:
        """What is named here and is no feature."""
        return {name for name in (self.column, self.group, self.time) if name is not None}

    @model_validator(mode="after")
    def _column_is_given(self) -> Split:
        if self.column is not None and self.test != "given":
            raise ValueError(
                f"a split by column {self.column!r} needs test: given, but got {self.test}"
            )
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        distinct({"column": self.column, "group": self.group, "time": self.time})
        if self.group is not None and self.time is not None:
            raise ValueError(
                f"a split is by group or by time, but got group {self.group!r} and time "
                f"{self.time!r}: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Split:
        if self.test != "given" and self.test + self.validation >= 1:
            raise ValueError(
                f"test + validation < 1 must hold, but got {self.test} + {self.validation}"
            )
        return self
