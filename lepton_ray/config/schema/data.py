"""Where the data are, how they are split, and how they become numbers."""

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
from lepton_ray.config.schema.sequences import InteractionData, SeriesData
from lepton_ray.config.schema.splits import Split
from lepton_ray.config.schema.tables import TableData

Side = Annotated[int, Field(ge=1, le=1024)]


class ImagePreprocess(Section):
    size: tuple[Side, Side] | None = None
    """Pixels [height, width] that the pictures of a folder are scaled to; what is over is cut off.
    Default: their median, made smaller to a longer side of 64."""
    color: Literal["grey", "rgb"] | None = None
    """What the pictures of a folder become. Default: grey if all are."""
    normalize: bool = True
    """Subtract the training split's mean and divide by its deviation, per channel."""


class TextPreprocess(Section):
    vocabulary: int = Field(30_000, ge=1)
    """Words the model knows: the most frequent of the training split. All others are one word.
    A pretrained model brings its own."""
    length: int = Field(256, ge=1)
    """Words of a text the model sees. A longer one is cut, and ``plan`` says of how many."""
    characters: int = Field(100_000, ge=1)
    """Characters a text may have: in the source, in a file to predict, and over HTTP."""


class ImageData(Section):
    kind: Literal["image"]
    source: str
    """A folder with a folder of pictures for each class, or with ``train/`` and ``test/`` of such;
    a folder with the IDX files of MNIST, an ``.npz`` with x and y (and the names of labels, where y
    has a column of 0 and 1 for each), or ``sklearn:digits``."""
    max_bad: float = Field(0.01, ge=0, lt=1)
    """Share of a folder's pictures that may be unreadable; they are named and left out."""
    split: Split = Split()
    preprocess: ImagePreprocess = ImagePreprocess()

    @field_validator("split")
    @classmethod
    def _has_no_columns(cls, split: Split) -> Split:
        if split.columns:
            raise ValueError(f"images have no columns to split by, but got {min(split.columns)!r}")
        return split


class TextData(Section):
    kind: Literal["text"]
    source: Source
    """As of a table."""
    text: str
    """The column of texts. An empty cell is an empty text."""
    target: Target
    """The column of classes to predict; or labels, as of a table."""
    separator: Separator | None = None
    """As of a table."""
    split: Split = Split()
    preprocess: TextPreprocess = TextPreprocess()

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict."""
        return columns_of(self.target, self.separator)

    @model_validator(mode="after")
    def _reads_no_answer(self) -> TextData:
        for target in self.targets:
            named = {"text": self.text, "target": target, "split.column": self.split.column}
            distinct(named)
        return self


Data = ImageData | TableData | TextData | InteractionData | SeriesData
