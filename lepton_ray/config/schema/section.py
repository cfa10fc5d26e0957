"""What all sections have in common: frozen, unknown keys refused, no infinite numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Source = str | Annotated[tuple[str, ...], Field(min_length=1)]


def _named(target: Any) -> Any:
    several = isinstance(target, list | tuple) and len(target) > 1
    if isinstance(target, str) or (several and all(isinstance(name, str) for name in target)):
        return target
    raise ValueError(
        f"target names a column, or a list of at least two columns of labels, but got {target!r}"
    )


Target = Annotated[str | Annotated[tuple[str, ...], Field(min_length=2)], BeforeValidator(_named)]
Separator = Annotated[str, Field(min_length=1)]


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


def columns_of(target: Target, separator: str | None) -> tuple[str, ...]:
    """The columns to predict.

    Raises:
        ValueError: when they are named twice, or labels have two forms at once.
    """
    names = (target,) if isinstance(target, str) else target
    if separator is not None and not isinstance(target, str):
        raise ValueError(
            f"separator is for the cells of one column, but target lists {len(names)}: leave it "
            "out, or name one column in target"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"target names each column once, but has {twice[0]!r} twice")
    return names


def distinct(columns: Mapping[str, str | None]) -> None:
    """Raise where two settings name one column."""
    for (first, column), (second, other) in itertools.combinations(columns.items(), 2):
        if column == other and column is not None:
            raise ValueError(f"{first} and {second} must be two columns, but both are {column!r}")
