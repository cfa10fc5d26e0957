"""How the columns of a table become numbers: fitted on training rows, the same code everywhere.

Each column has a `Feature`. It writes its numbers into a part of a row, and says of which blocks
that part is made: a block of one number is an amount, a wider one a category or an angle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import TablePreprocess
from lepton_ray.data import dates, spread
from lepton_ray.data.hands import Hands
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError

Values = npt.NDArray[np.float64]
Out = npt.NDArray[np.float32]
KNOTS = 256  # of a quantile scale, once over the rows and once over the distinct values
FAR = 1e-3  # share of the rows beyond the ends of a quantile scale
CYCLES_S = {"year": 365.2425 * 86_400.0, "week": 7 * 86_400.0, "day": 86_400.0}


@dataclass(frozen=True, kw_only=True)
class Number:
    """An amount, scaled; where gaps are allowed, also whether it is one."""

    kind: ClassVar[str] = "number"
    name: str
    fill: float | None = None
    """What stands for a gap; None where gaps are refused."""
    indicator: bool = False
    log: bool = False
    """Whether it is replaced by sign(x) * log(1 + abs(x)), before anything else."""
    mean: float = 0.0
    scale: float = 1.0
    knots: npt.NDArray[np.float64] | None = None
    """[2, k] Values and what they become, with lines between; instead of mean and scale."""

    @property
    def blocks(self) -> tuple[int, ...]:
        return (1, 1) if self.indicator else (1,)

    def encode(self, given: Any, out: Out) -> None:
        values = np.asarray(given, np.float64)
        absent = ~np.isfinite(values)
        if absent.any():
            if self.fill is None:
                raise DataError(missing_message(self.name, int(absent.sum()), len(values)))
            values = np.where(absent, self.fill, values)
        if self.indicator:
            out[:, 1] = absent
        if self.log:
            values = signed_log(values)
        if self.knots is not None:
            out[:, 0] = np.interp(values, *self.knots)
            return
        # Too large for float32 becomes infinite, and the answer is refused for it.
        with np.errstate(over="ignore"):
            out[:, 0] = (values - np.float32(self.mean)) * np.float32(self.scale)


@dataclass(frozen=True, kw_only=True)
class Category:
    """One of some texts. One never seen, or too rare, is `others`, or nothing where none is."""

    kind: ClassVar[str] = "category"
    name: str
    categories: tuple[str, ...]
    """Sorted."""
    others: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        return (len(self.categories) + self.others,)

    def encode(self, given: Any, out: Out) -> None:
        known = np.asarray(self.categories, np.str_)
        texts = np.asarray(given).astype(np.str_)
        out[:] = 0.0
        if self.others:
            out[:, -1] = 1.0
        if len(known) == 0:
            return
        position = np.searchsorted(known, texts)
        position[position == len(known)] = 0
        rows = np.flatnonzero(known[position] == texts)
        out[rows, position[rows]] = 1.0
        if self.others:
            out[rows, -1] = 0.0


@dataclass(frozen=True, kw_only=True)
class Date:
    """Time since the training rows' mean, and as angles where in the year, week and day it is."""

    kind: ClassVar[str] = "date"
    name: str
    format: str
    mean: float
    """Seconds since 1970."""
    scale: float
    cycles: tuple[str, ...]
    optional: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        return (1, *(2 for _ in self.cycles), *((1,) if self.optional else ()))

    def encode(self, given: Any, out: Out) -> None:
        seconds = dates.seconds(given, self.format)
        absent = np.isnan(seconds)
        if absent.any():
            if not self.optional:
                raise DataError(missing_message(self.name, int(absent.sum()), len(seconds), "date"))
            seconds = np.where(absent, self.mean, seconds)
        out[:, 0] = (seconds - self.mean) * self.scale
        for at, cycle in enumerate(self.cycles):
            angle = 2 * np.pi * (seconds % CYCLES_S[cycle]) / CYCLES_S[cycle]
            out[:, 1 + 2 * at] = np.sin(angle)
            out[:, 2 + 2 * at] = np.cos(angle)
        if self.optional:
            out[:, -1] = absent
            out[absent, :-1] = 0.0


Feature = Number | Category | Date
KINDS: dict[str, Callable[..., Feature]] = {f.kind: f for f in (Number, Category, Date)}


def fit(
    columns: tuple[Column, ...],
    values: Mapping[str, npt.NDArray[Any]],
    settings: TablePreprocess,
    hands: Hands,
) -> tuple[tuple[Column, ...], tuple[Feature, ...]]:
    """The columns with what the training rows say of them, and their features.

    Raises:
        DataError: for gaps when ``missing`` is ``refuse``, a column that is empty, and settings
            that name no column of their kind.
    """
    numbers = {column.name for column in columns if column.kind == "number"}
    for name in settings.log:
        if name not in numbers:
            raise DataError(
                f"data.preprocess.log names {name!r}, but the columns of numbers are "
                f"{', '.join(sorted(numbers)) or 'none'}: take it out"
            )
    asked = ((column, values[column.name]) for column in columns)
    found = list(hands.map("columns to fit", partial(_fit, settings), asked, len(columns)))
    return tuple(column for column, _ in found), tuple(feature for _, feature in found)


def _fit(
    settings: TablePreprocess, asked: tuple[Column, npt.NDArray[Any]]
) -> tuple[Column, Feature]:
    fits = {"number": _fit_number, "category": _fit_category, "date": _fit_date}
    column, values = asked
    return fits[column.kind](column, values, settings)


def _fit_number(
    column: Column, given: npt.NDArray[Any], settings: TablePreprocess
) -> tuple[Column, Feature]:
    values = given.astype(np.float64)
    present = values[np.isfinite(values)]
    optional = _optional(column.name, len(present), len(values), settings.missing, "finite number")
    fill: float | None = None
    if optional:
        fill = float(np.median(present) if settings.missing == "median" else present.mean())
        fill = float(np.float32(fill))
    fitted = replace(column, low=float(present.min()), high=float(present.max()), optional=optional)
    filled = values if fill is None else np.where(np.isfinite(values), values, fill)
    log = column.name in settings.log
    if log:
        filled, present = signed_log(filled), signed_log(present)
    feature = Number(name=column.name, fill=fill, indicator=len(present) < len(values), log=log)
    if settings.scale == "quantile":
        return fitted, replace(feature, knots=_knots(present))
    deviation = float(spread.deviation(filled))
    return fitted, replace(
        feature,
        mean=float(filled.mean()),
        scale=float(np.float32(1.0 / deviation if deviation > 0 else 1.0)),
    )


def _knots(present: Values) -> npt.NDArray[np.float64]:
    """[2, k] Values, and the normal quantile of their rank.

    The rank is the mean of that among the rows and that among the distinct values: a value that
    nearly all rows have would otherwise leave all others one end of the scale to share.
    """
    from scipy.special import ndtri  # type: ignore[import-untyped]

    ordered = np.sort(present)
    distinct = np.unique(ordered)
    places = np.linspace(0.0, 1.0, KNOTS)
    values = np.unique(
        np.concatenate(
            [
                ordered[np.rint(places * (len(ordered) - 1)).astype(np.int64)],
                distinct[np.rint(places * (len(distinct) - 1)).astype(np.int64)],
            ]
        )
    )
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    among_rows = (below + upto) / 2 / len(ordered)
    among_distinct = (np.searchsorted(distinct, values) + 0.5) / len(distinct)
    rank = (among_rows + among_distinct) / 2
    return np.stack([values, ndtri(rank.clip(FAR, 1 - FAR))])


def _fit_category(
    column: Column, given: npt.NDArray[Any], settings: TablePreprocess
) -> tuple[Column, Feature]:
    known, counts = np.unique(given.astype(np.str_), return_counts=True)
    # The most frequent ones; of equally frequent ones, the first by code point.
    order = np.argsort(-counts, kind="stable")[: settings.categories]
    kept = np.sort(order[counts[order] >= settings.rare])
    names = tuple(known[kept].tolist())
    others = len(kept) < len(known)
    return (
        replace(column, categories=names),
        Category(name=column.name, categories=names, others=others),
    )


def _fit_date(
    column: Column, given: npt.NDArray[Any], settings: TablePreprocess
) -> tuple[Column, Feature]:
    seconds = dates.seconds(given, column.format)
    present = seconds[np.isfinite(seconds)]
    optional = _optional(column.name, len(present), len(seconds), settings.missing, "date")
    deviation = float(spread.deviation(present))
    has_clock = bool((present % 86_400 != 0).any())
    return replace(
        column, low=float(present.min()), high=float(present.max()), optional=optional
    ), Date(
        name=column.name,
        format=column.format,
        mean=float(present.mean()),
        scale=1.0 / deviation if deviation > 0 else 1.0,
        cycles=("year", "week", "day") if has_clock else ("year", "week"),
        optional=optional,
    )


def _optional(name: str, present: int, total: int, missing: str, what: str) -> bool:
    """Whether gaps may be in a column that has this many values in the training rows.

    Raises:
        DataError: when it is empty, or has gaps that are refused.
    """
    if present == 0:
        raise DataError(
            f"column {name!r} has no {what} in any of {total} training rows: leave it out with "
            f"data.drop: [{name}]"
        )
    if present < total and missing == "refuse":
        raise DataError(missing_message(name, total - present, total, what))
    return missing != "refuse"


def notes(columns: tuple[Column, ...], fitted: tuple[Feature, ...]) -> tuple[str, ...]:
    """What a person should know of a table's columns, for the plan to tell."""
    count = Counter(column.kind for column in columns)
    told = [
        f"{count['number']} columns of numbers, {count['category']} of categories, "
        f"{count['date']} of dates"
    ]
    constant = [
        f.name
        for c, f in zip(columns, fitted, strict=True)
        if sum(f.blocks) == 1 and (c.low == c.high if c.kind != "category" else True)
    ]
    if constant:
        told.append(f"always the same in training, so of no use: {', '.join(constant)} (data.drop)")
    pooled = [f.name for f in fitted if isinstance(f, Category) and f.others]
    if pooled:
        told.append(f"rare categories are taken together in {', '.join(pooled)}")
    return tuple(told)


def signed_log(values: Values) -> Values:
    """Large amounts drawn together, also negative ones; 0 stays 0."""
    result: Values = np.sign(values) * np.log1p(np.abs(values))
    return result


def missing_message(name: str, absent: int, total: int, what: str = "finite number") -> str:
    return (
        f"column {name!r} has no {what} in {absent} of {total} rows: fill or drop them, or set "
        "data.preprocess.missing: median"
    )
