"""Where the data are, how they are split, and how they become numbers."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lepton_ray.config.schema.section import Section


class Split(Section):
    test: Literal["given"] | Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the samples held out for the gate, or ``given``: the source brings its own."""
    column: str | None = None
    """The column of a table or of texts that says ``train`` or ``test`` of every row."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the remaining samples that tuning and early stopping look at."""
    seed: int = Field(0, ge=0)

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


Side = Annotated[int, Field(ge=1, le=1024)]


class ImagePreprocess(Section):
    size: tuple[Side, Side] | None = None
    """Pixels [height, width] that the pictures of a folder are scaled to; what is over is cut off.
    Default: their median, made smaller to a longer side of 64."""
    color: Literal["grey", "rgb"] | None = None
    """What the pictures of a folder become. Default: grey if all are."""
    normalize: bool = True
    """Subtract the training split's mean and divide by its deviation, per channel."""


class TablePreprocess(Section):
    missing: Literal["refuse", "median"] = "refuse"
    """What an empty number is: an error, or the training split's median."""


class TextPreprocess(Section):
    vocabulary: int = Field(30_000, ge=1)
    """Words the model knows: the most frequent of the training split. All others are one word."""
    length: int = Field(256, ge=1)
    """Words of a text the model sees. A longer one is cut, and ``plan`` says of how many."""
    characters: int = Field(100_000, ge=1)
    """Characters a text may have: in the source, in a file to predict, and over HTTP."""


def _distinct(columns: dict[str, str | None]) -> None:
    """Raise where two settings name one column."""
    for (first, column), (second, other) in itertools.combinations(columns.items(), 2):
        if column == other:
            raise ValueError(f"{first} and {second} must be two columns, but both are {column!r}")


class ImageData(Section):
    kind: Literal["image"]
    source: str
    """A folder with a folder of pictures for each class, or with ``train/`` and ``test/`` of such;
    a folder with the IDX files of MNIST, an ``.npz`` with x and y, or ``sklearn:digits``."""
    max_bad: float = Field(0.01, ge=0, lt=1)
    """Share of a folder's pictures that may be unreadable; they are named and left out."""
    split: Split = Split()
    preprocess: ImagePreprocess = ImagePreprocess()

    @field_validator("split")
    @classmethod
    def _has_no_columns(cls, split: Split) -> Split:
        if split.column is not None:
            raise ValueError(f"images have no columns to split by, but got {split.column!r}")
        return split


class TableData(Section):
    kind: Literal["table"]
    source: str
    """A CSV, Parquet or JSONL file, or ``sklearn:`` and breast_cancer, diabetes, iris or wine."""
    target: str
    """The column to predict."""
    task: Literal["classification", "regression"] = "classification"
    """Whether the target is one of some classes or a number."""
    drop: tuple[str, ...] = ()
    """Columns that are not features (an id, a leak)."""
    split: Split = Split()
    preprocess: TablePreprocess = TablePreprocess()

    @model_validator(mode="after")
    def _splits_by_a_column_of_its_own(self) -> TableData:
        _distinct({"target": self.target, "split.column": self.split.column})
        return self


class TextData(Section):
    kind: Literal["text"]
    source: str
    """A CSV, Parquet or JSONL file, in UTF-8."""
    text: str
    """The column of texts. An empty cell is an empty text."""
    target: str
    """The column of classes to predict."""
    split: Split = Split()
    preprocess: TextPreprocess = TextPreprocess()

    @model_validator(mode="after")
    def _reads_no_answer(self) -> TextData:
        named = {"text": self.text, "target": self.target, "split.column": self.split.column}
        _distinct(named)
        return self


Data = ImageData | TableData | TextData
