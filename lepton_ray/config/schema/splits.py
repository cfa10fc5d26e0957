"""Which samples are for training, validation and the test."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lepton_ray.config.schema.section import Section


class Split(Section):
    test: Literal["given"] | Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the samples held out for the gate, or ``given``: the source brings its own."""
    column: str | None = None
    """The column of a table or of texts that says ``train`` or ``test`` of every row."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the remaining samples that tuning and early stopping look at."""
    seed: int = Field(0, ge=0)

    @property
    def columns(self) -> set[str]:
        """What is named here and is no feature."""
        return {name for name in (self.column,) if name is not None}

    @model_validator(mode="after")
    def _column_is_given(self) -> Split:
        if self.column is not None and self.test != "given":
            raise ValueError(
                f"a split by column {self.column!r} needs test: given, but got {self.test}"
            )
        return self

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Split:
        if self.test != "given" and self.test + self.validation >= 1:
            raise ValueError(
                f"test + validation < 1 must hold, but got {self.test} + {self.validation}"
            )
        return self
