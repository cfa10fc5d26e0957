"""A table: where its rows are, what its columns are, and how they become numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lepton_ray.config.schema.section import (
    Section,
    Separator,
    Source,
    Target,
    columns_of,
    distinct,
)
from lepton_ray.config.schema.splits import Split

ColumnType = Annotated[str, Field(pattern=r"^(number|category|date( .*%.*)?)$")]


class TablePreprocess(Section):
    missing: Literal["refuse", "median", "mean"] = "refuse"
    """What an empty number or date is: an error, or the training split's median or mean, with a
    number beside it that says so. An empty category is a category."""
    scale: Literal["standard", "quantile"] = "standard"
    """Of numbers: less the mean, over the deviation; or by their rank, which is for columns with
    long tails, and takes what lies beyond the training split for its largest or smallest."""
    log: tuple[str, ...] = ()
    """Columns of numbers that are replaced by their logarithm: sign(x) * log(1 + abs(x))."""
    rare: int = Field(1, ge=1)
    """Training rows that a category needs; all rarer ones, and those never seen, are one."""
    categories: int = Field(256, ge=1)
    """Categories of a column that are told apart, the most frequent; all others are one."""


class TableData(Section):
    kind: Literal["table"]
    source: Source
    """A CSV, Parquet or JSONL file, a pattern such as ``rows/*.csv``, a folder of such files, each
    here or at a URI (``s3://``, ``gs://``), your own ``package.module:function`` that returns a
    pandas data frame or columns by name, ``sklearn:`` and breast_cancer, diabetes, iris or wine; or
    a list of these."""
    target: Target
    """The column to predict. Or a list of columns of 0 and 1 (``false`` and ``true``), each of
    which says whether a row has the label that it is named after."""
    separator: Separator | None = None
    """What stands between the labels in a cell of the target, as in ``comedy|drama``; an empty cell
    has none. Cells that are lists (JSONL, Parquet) need no separator."""
    task: Literal["classification", "regression"] = "classification"
    """Whether the target is one of some classes (or any of some labels) or a number."""
    target_log: bool = False
    """Whether a number to predict is learned as its logarithm: sign(y) * log(1 + abs(y))."""
    drop: tuple[str, ...] = ()
    """Columns that are not features (an id, a leak)."""
    types: dict[str, ColumnType] = {}
    """What columns are, where their values say it wrongly: ``number``, ``category``, ``date``, or
    with the form of its texts ``date %d.%m.%Y``."""
    split: Split = Split()
    preprocess: TablePreprocess = TablePreprocess()

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict."""
        return columns_of(self.target, self.separator)

    @field_validator("types", mode="before")
    @classmethod
    def _types(cls, types: object) -> object:
        known = "number, category, date, or date and its form as in 'date %d.%m.%Y'"
        for name, value in types.items() if isinstance(types, dict) else ():
            words = str(value).split(" ", 1)
            if words[0] not in ("number", "category", "date") or (
                len(words) == 2 and (words[0] != "date" or "%" not in words[1])
            ):
                raise ValueError(f"the type of {name!r} must be {known}, but got {value!r}")
        return types

    @model_validator(mode="after")
    def _settings_name_features(self) -> TableData:
        split = self.split
        for target in self.targets:
            named = {"target": target, "split.column": split.column, "split.group": split.group}
            distinct(named | {"split.time": split.time})
        several = "separator is" if self.separator is not None else "several targets are"
        if self.task == "regression" and (self.separator is not None or len(self.targets) > 1):
            raise ValueError(
                f"{several} for labels, but task is regression: name one column of numbers in "
                "target, or leave task out"
            )
        if self.target_log and self.task != "regression":
            raise ValueError(
                "target_log is for a number to predict, but task is classification: leave it out, "
                "or set task: regression"
            )
        for name in self.types:
            if name in self.targets or name in self.drop:
                raise ValueError(f"types are those of features, but {name!r} is none: take it out")
        return self
