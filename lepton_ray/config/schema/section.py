"""What all sections have in common: frozen, unknown keys refused, no infinite numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Source = str | Annotated[tuple[str, ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class OpenSection(Section):
    """A section whose further keys go to a function by name (a model, an optimizer)."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The keys besides ``name``."""
        return dict(self.model_extra or {})


def distinct(columns: Mapping[str, str | None]) -> None:
    """Raise where two settings name one column."""
    for (first, column), (second, other) in itertools.combinations(columns.items(), 2):
        if column == other and column is not None:
            raise ValueError(f"{first} and {second} must be two columns, but both are {column!r}")
