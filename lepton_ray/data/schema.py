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
    kind: Literal["image", "number", "category", "date", "text", "id", "time", "series"]
    shape: tuple[int, ...] = ()
    """Of one value: (height, width) or (height, width, channels) for an image, (steps,) for values
    over time, () otherwise."""
    resized: bool = False
    """Whether a picture of any size is scaled to the shape, as it was in training."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest value of the training split (of the format, for an image); of a date,
    in seconds since 1970."""
    optional: bool = False
    """Whether a number, a date or a value over time may be missing. A category always may: it is
    the empty one."""
    lookup: bool = False
    """Whether a row may go without the column: what is known of the row's id is taken then."""
    closed: bool = False
    """Whether an id must be one of ``categories``."""
    format: str = ""
    """Of a date, see `dates`."""
    categories: tuple[str, ...] = ()
    """The values of a category, or the ids, seen in training, sorted."""
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
    """What it answers with, one of them, or any (multilabel); empty for a number (regression)."""
    task: Literal["", "classification", "multilabel", "regression", "ranking", "forecast"] = ""
    """What is answered; left empty, classification where there are classes, else regression."""
    items: tuple[str, ...] = ()
    """What a ranking chooses from."""
    top_k: int = 0
    """Items that a ranking lists where a request does not say."""
    horizon: int = 0
    """Values of a forecast."""

    def __post_init__(self) -> None:
        if not self.task:
            task = "classification" if self.classes else "regression"
            object.__setattr__(self, "task", task)

    @property
    def outputs(self) -> int:
        """Numbers a model gives for a sample: one per class, label, item or step ahead, or one."""
        return len(self.classes) or len(self.items) or self.horizon or 1

    @property
    def answer(self) -> str:
        """What is answered, in words."""
        if self.task == "ranking":
            return f"{len(self.items):,} items to rank"
        if self.task == "multilabel":
            return f"any of {len(self.classes)} labels"
        if self.task == "forecast":
            return f"{self.horizon} values to forecast"
        return f"{len(self.classes)} classes" if self.classes else "a number to predict"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Schema:
        columns = tuple(map(Column.from_json, value["columns"]))
        lists = {name: tuple(value.get(name, ())) for name in ("classes", "items")}
        return Schema(**{**value, **lists, "columns": columns})
