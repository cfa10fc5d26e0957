"""How far rows are from those that a model was trained on: one number a column.

At training a column's values are counted in bins: a number's between its deciles, a category's by
what is most frequent. Later rows are counted in the same bins, and compared by the population
stability index, the sum over the bins of (q - p) * ln(q / p) for shares p and q. It is 0 for equal
shares; by a common rule of thumb it tells something from 0.1 and much from 0.25. Of a picture the
mean brightness is compared, of a text how many words it has and what share of them is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data import words
from lepton_ray.data.fitted import Fitted
from lepton_ray.data.preprocess import Preprocess

Counts = npt.NDArray[np.int64]

NUMBERS, CATEGORIES = 10, 20  # bins
MOST_ROWS = 100_000  # that the bins are made from
FEWEST = 500  # rows that are compared: chance alone makes about 1 / 50 of 500 and ten bins
LEAST = 1e-3  # a smaller share counts as this one, so that a single new value tells little
NOTICEABLE = 0.1


@dataclass(frozen=True)
class Drift:
    """Of one column."""

    psi: float
    """Population stability index."""
    unseen: float
    """Share of the values in bins that are empty in the training data: out of its range, say."""
    rows: int
    """That were compared."""


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Of one column, with how many of the training values are in each."""

    counts: tuple[int, ...]
    edges: tuple[float, ...] | None = None
    """Of a number: below the first, up to and with each, above the last, and no number at all."""
    categories: tuple[str, ...] | None = None
    """Of a category: each of these, and all others."""

    def count(self, values: npt.NDArray[Any]) -> Counts:
        """[bins] How many of the values [n] are in each."""
        if self.edges is not None:
            return _in_edges(np.array(self.edges, np.float32), values)
        return _in_categories(self.categories or (), values)

    def compare(self, counts: npt.ArrayLike) -> Drift | None:
        """Counts [bins] of later values; None where they are too few to tell."""
        found, trained = np.asarray(counts, np.float64), np.array(self.counts, np.float64)
        rows = float(found.sum())
        if rows < FEWEST:
            return None
        p = np.maximum(trained / trained.sum(), LEAST)
        q = np.maximum(found / rows, LEAST)
        psi = float(((q - p) * np.log(q / p)).sum())
        return Drift(round(psi, 4), round(float(found[trained == 0].sum()) / rows, 4), int(rows))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Bins:
        return Bins(**{name: tuple(given) for name, given in value.items()})


def fit(fitted: Fitted, columns: Mapping[str, Any]) -> dict[str, Bins]:
    """What is compared, by name -> its bins.

    Args:
        columns: column name -> values [n, ...] of the training split.
    """
    found = {}
    some = {name: v[:: len(v) // MOST_ROWS + 1].copy() for name, v in columns.items()}
    for name, values in measured(fitted, some).items():
        if values.dtype.kind == "f":
            edges = _deciles(values)
            counts = _in_edges(edges, values)
            bins = Bins(counts=tuple(counts.tolist()), edges=tuple(edges.tolist()))
        else:
            known, frequency = np.unique(values.astype(np.str_), return_counts=True)
            # Of equally frequent ones, the first by code point.
            order = np.argsort(-frequency, kind="stable")[:CATEGORIES]
            categories = tuple(known[order].tolist())
            counts = _in_categories(categories, values)
            bins = Bins(counts=tuple(counts.tolist()), categories=categories)
        found[name] = bins
    return found


def measured(fitted: Fitted, columns: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """What is compared, by name -> a number or a text of each row [n].

    Nothing for dates, which go on by nature, and for interactions and series.
    """
    if not isinstance(fitted, Preprocess):
        return {}
    first = fitted.columns[0]
    if first.kind == "image":
        pixels = np.asarray(columns[first.name])
        axes = tuple(range(1, pixels.ndim))
        return {f"brightness of {first.name}": pixels.mean(axis=axes, dtype=np.float64)}
    if fitted.tokenizer is not None:
        numbers = fitted.apply(columns)
        count = (numbers != 0).sum(axis=1)
        unknown = (numbers == (words.unknown(fitted.tokenizer) or -1)).sum(axis=1)
        unknown = unknown / np.maximum(count, 1)
        return {
            f"words of {first.name}": count.astype(np.float64),
            f"unknown words of {first.name}": unknown,
        }
    kinds: dict[str, type[np.generic]] = {"number": np.float64, "category": np.str_}
    return {
        column.name: np.asarray(columns[column.name]).astype(kinds[column.kind])
        for column in fitted.columns
        if column.kind in kinds
    }


def _deciles(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Edges, see `Bins`. In float32, as sources have their numbers: a request's 0.7 is theirs."""
    present = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        low, *inner = np.quantile(present, np.linspace(0, 1, NUMBERS + 1), method="lower").astype(
            np.float32
        )
        return np.unique(np.array([np.nextafter(low, np.float32(-np.inf)), *inner]))


def _in_edges(edges: npt.NDArray[np.float32], values: npt.NDArray[Any]) -> Counts:
    numbers = values.astype(np.float64)
    with np.errstate(over="ignore"):  # beyond the last edge is infinity too
        at = np.searchsorted(edges, numbers.astype(np.float32), side="left")
    at[~np.isfinite(numbers)] = len(edges) + 1
    return np.bincount(at, minlength=len(edges) + 2)


def _in_categories(categories: tuple[str, ...], values: npt.NDArray[Any]) -> Counts:
    place = {category: at for at, category in enumerate(categories)}
    counts = np.zeros(len(categories) + 1, np.int64)
    for text, n in zip(*np.unique(values.astype(np.str_), return_counts=True), strict=True):
        counts[place.get(str(text), len(categories))] += n
    return counts
