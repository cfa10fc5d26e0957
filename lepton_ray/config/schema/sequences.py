"""Data that are not rows of their own: who rated what, and values over time."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lepton_ray.config.schema.section import Section, distinct

Share = Annotated[float, Field(gt=0, lt=1)]


class InteractionSplit(Section):
    by: Literal["random", "time", "last"] | None = None
    """``random``: a share by chance; ``time``: the latest share; ``last``: each user's last item
    to test and the one before to validate. Default: ``last`` for a ranking with times, else
    ``random``."""
    test: Share = 0.2
    """Share of the interactions held out for the gate (not with ``last``)."""
    validation: Share = 0.1
    """Share of the remaining ones that tuning and early stopping look at (not with ``last``)."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _last_has_no_shares(self) -> InteractionSplit:
        given = sorted({"test", "validation"} & self.model_fields_set)
        defaults = (0.2, 0.1)  # a rendered experiment writes them out
        if self.by == "last" and given and (self.test, self.validation) != defaults:
            raise ValueError(
                f"by: last takes one item of each user, so {given[0]} says nothing: leave it out"
            )
        return self


class Features(Section):
    user: tuple[str, ...] = ()
    """Columns that say something of the user, such as age."""
    item: tuple[str, ...] = ()
    """Columns that say something of the item, such as genre."""


class InteractionData(Section):
    kind: Literal["interactions"]
    source: str
    """A CSV, Parquet or JSONL file with a row for each interaction."""
    user: str
    """The column of users' ids."""
    item: str
    """The column of items' ids."""
    rating: str | None = None
    """The column of numbers to predict. A ranking needs none: what is there, was liked."""
    time: str | None = None
    """The column that says when, as numbers or dates; a split by time or by last needs it."""
    task: Literal["rating", "ranking"] = "rating"
    """Whether a user's rating of an item is predicted, or which items come next."""
    features: Features = Features()
    negatives: int = Field(50, ge=1)
    """Of a ranking: items never taken that each one that was taken is set against in a step."""
    top_k: int = Field(10, ge=1)
    """Of a ranking: how many items an answer lists, and recall and NDCG look at."""
    split: InteractionSplit = InteractionSplit()

    @model_validator(mode="after")
    def _fits(self) -> InteractionData:
        named = {"user": self.user, "item": self.item, "rating": self.rating, "time": self.time}
        for side in ("user", "item"):
            for column in getattr(self.features, side):
                named[f"features.{side} {column}"] = column
        distinct({name: column for name, column in named.items() if column is not None})
        if self.task == "rating" and self.rating is None:
            raise ValueError(
                "task: rating needs the column to predict: set rating, or task: ranking"
            )
        if self.split.by in ("time", "last") and self.time is None:
            raise ValueError(f"split.by: {self.split.by} needs times: set time to their column")
        return self

    @property
    def split_by(self) -> Literal["random", "time", "last"]:
        """How it is split, with the default filled in."""
        if self.split.by is not None:
            return self.split.by
        return "last" if self.task == "ranking" and self.time is not None else "random"


class SeriesSplit(Section):
    """By time: the latest values test, those before validate."""

    test: Share | datetime.datetime = 0.2
    """Share of the whole time that is held out for the gate, or when it begins."""
    validation: Share | datetime.datetime = 0.1
    """Share of the time before that tuning and early stopping look at, or when it begins."""

    @field_validator("test", "validation", mode="before")
    @classmethod
    def _is_no_number_of_seconds(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(f"must be a share between 0 and 1, or a time, but got {value}")
        return value


class Covariates(Section):
    known: tuple[str, ...] = ()
    """Columns of numbers that are known in advance, such as a holiday or a price."""
    past: tuple[str, ...] = ()
    """Columns of numbers that are known up to now, such as the weather."""


class SeriesPreprocess(Section):
    unsorted: Literal["refuse", "sort"] = "refuse"
    """What rows are that do not come in the order of their times."""
    repeated: Literal["refuse", "first", "last", "mean"] = "refuse"
    """What several rows of one time are: an error, or the first, the last or the mean of them."""
    gaps: Literal["refuse", "last", "mask"] = "refuse"
    """What a time without a value is: an error; the last value before it; or that, marked as not
    measured, for a model to see and with no part in loss and metrics."""


class SeriesData(Section):
    kind: Literal["series"]
    source: str
    """A CSV, Parquet or JSONL file with a row for each time."""
    time: str
    """The column of times. Those with an offset are taken in UTC."""
    target: str
    """The column of numbers to forecast."""
    id: str | None = None
    """The column that says which series a row is of, where there are several."""
    horizon: int = Field(24, ge=1)
    """Values to forecast."""
    history: int = Field(168, ge=1)
    """Values before them that the model sees."""
    frequency: str | None = None
    """Between two values, as pandas writes it: ``h``, ``15min``, ``D``, ``7D``, ``MS``. Default:
    what most of the times say."""
    covariates: Covariates = Covariates()
    split: SeriesSplit = SeriesSplit()
    preprocess: SeriesPreprocess = SeriesPreprocess()

    @model_validator(mode="after")
    def _columns_differ(self) -> SeriesData:
        named: dict[str, str | None] = {"time": self.time, "target": self.target, "id": self.id}
        for side in ("known", "past"):
            for column in getattr(self.covariates, side):
                named[f"covariates.{side} {column}"] = column
        distinct({name: column for name, column in named.items() if column is not None})
        return self
