"""What a sample looks like: the columns a model takes and the classes it answers with.

Values only: this travels with every model version as JSON and becomes the signature of the
version and the request type of its endpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Column:
    name: str
    kind: Literal["image", "number", "category", "date", "text"]
    shape: tuple[int, ...] = ()
    """Of one value: (height, width) or (height, width, channels) for an image, () otherwise."""
    resized: bool = False
    """Whether a picture of any size is scaled to the shape, as it was in training."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest value of the training split (of the format, for an image); of a date,
    in seconds since 1970."""
    optional: bool = False
    """Whether a number or a date may be missing. A category always may: it is the empty one."""
    format: str = ""
    """Of a date, see `dates`."""
    categories: tuple[str, ...] = ()
    """The values of a category seen in training, sorted."""
    longest: int | None = None
    """Characters a text may have."""

    @staticmethod
    def from_json(value: dict[str, Any]) -> Column:
        """The inverse of `dataclasses.asdict`, over JSON."""
        shape, categories = tuple(value["shape"]), tuple(value["categories"])
        return Column(**{**value, "shape": shape, "categories": categories})


@dataclass(frozen=True, kw_only=True)
class Schema:
    columns: tuple[Column, ...]
    target: str
    classes: tuple[str, ...] = field(default=())
    """What it answers with; empty for a number (regression)."""

    @property
    def outputs(self) -> int:
        """Numbers a model gives for a sample: a logit per class, or one value."""
        return len(self.classes) or 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Schema:
        columns = tuple(map(Column.from_json, value["columns"]))
        return Schema(columns=columns, target=value["target"], classes=tuple(value["classes"]))
