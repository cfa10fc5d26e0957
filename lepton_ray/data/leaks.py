"""Signs that a test split is easier than the world: what it shares with the training split.

Warnings and no errors: a table of few categories repeats rows by nature, and only a person knows
whether a column is known before the answer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Split
from lepton_ray.data import dates
from lepton_ray.data.hands import Hands
from lepton_ray.data.schema import Column

Indices = npt.NDArray[np.int64]
SAME = 1 - 1e-9  # correlation of a number with the number to predict
MIX = np.uint64(1_099_511_628_211)  # of FNV
PART = 1 << 20  # rows that are hashed at a time
REPEATS = 0.5  # of the rows; a column with more distinct values says nothing by determining a class


def warnings(
    kinds: tuple[Column, ...],
    columns: Mapping[str, npt.NDArray[Any]],
    y: npt.NDArray[Any],
    parts: Mapping[str, Indices],
    split: Split,
    groups: npt.NDArray[Any] | None,
    hands: Hands,
) -> tuple[str, ...]:
    """Of a table or of texts, each with its way out.

    Args:
        y: [n] index of the class, or the number to predict; or [n, labels] 1 for each that it has.
    """
    train = parts["train"]
    asked = ((kind, columns[kind.name][train]) for kind in kinds)
    found = [
        _duplicates(columns, parts),
        *hands.map("columns to check", partial(_telling, y[train]), asked, len(kinds)),
        *(
            _backwards(kind, columns[kind.name], parts)
            for kind in kinds
            if kind.kind == "date" and split.time is None
        ),
        _shared_groups(groups, parts, split.group),
    ]
    return tuple(f"warning: {told}" for told in found if told)


def _duplicates(columns: Mapping[str, npt.NDArray[Any]], parts: Mapping[str, Indices]) -> str:
    rows = np.zeros(len(next(iter(columns.values()))), np.uint64)
    for values in columns.values():  # one after the other, so that they are never copied together
        for part in (slice(at, at + PART) for at in range(0, len(rows), PART)):
            _add(rows[part], values[part])
    train = rows[parts["train"]]
    train.sort()
    test = rows[parts["test"]]
    place = np.searchsorted(train, test)
    place[place == len(train)] = 0
    repeated = int((train[place] == test).sum())
    if not repeated:
        return ""
    return (
        f"{repeated:,} of {len(parts['test']):,} test rows are in the training split too, but for "
        "the target: take repeated rows out, or keep them together with data.split.group"
    )


def _add(rows: npt.NDArray[np.uint64], values: npt.NDArray[Any]) -> None:
    """Take the values [n] of one more column into a number for each row [n]."""
    import pandas as pd

    if values.dtype.kind == "U":
        letters = np.ascontiguousarray(values).view(np.uint32).reshape(len(rows), -1)
        for position in range(letters.shape[1]):
            rows[:] = rows * MIX + letters[:, position]
    else:
        rows[:] = rows * MIX + pd.util.hash_array(values)


def _telling(y: npt.NDArray[Any], asked: tuple[Column, npt.NDArray[Any]]) -> str:
    """Whether one column alone says the target in every training row."""
    column, values = asked
    if column.kind == "text":
        return ""
    what = "the target" if y.ndim == 1 else "a label"
    says = f"column {column.name!r} alone tells {what} in every training row"
    out = f"if it is known only after it, leave it out with data.drop: [{column.name}]"
    if y.dtype.kind == "f":
        if column.kind != "number" or len(y) < 3:
            return ""
        known = np.isfinite(values)
        if known.mean() < REPEATS or values[known].std() == 0 or y[known].std() == 0:
            return ""
        same = abs(np.corrcoef(values[known], y[known])[0, 1]) > SAME
        return f"{says}: {out}" if same else ""
    if y.ndim == 2:
        return f"{says}: {out}" if _tells_label(column, values, y) else ""
    order = np.argsort(values, kind="stable")
    values = values[order]
    other = values[1:] != values[:-1]
    if column.kind == "number":
        other &= ~(np.isnan(values[1:]) & np.isnan(values[:-1]))  # all gaps are one value
    distinct = 1 + int(other.sum())
    if distinct < 2:
        return ""
    changes = np.diff(y[order]) != 0
    if distinct <= REPEATS * len(values):
        return "" if (changes & ~other).any() else f"{says}: {out}"
    if column.kind == "number":  # amounts: in their order, each class is one stretch
        return f"{says}: {out}" if changes.sum() == len(np.unique(y)) - 1 else ""
    return ""


def _tells_label(column: Column, values: npt.NDArray[Any], y: npt.NDArray[Any]) -> bool:
    """Whether the column's value says of some label [n, labels] whether a row has it."""
    _, inverse = np.unique(values, return_inverse=True)
    counts = np.bincount(inverse)
    if len(counts) < 2:
        return False
    if len(counts) <= REPEATS * len(values):
        starts = np.cumsum(counts) - counts
        rows = np.argsort(inverse, kind="stable")
        have = np.add.reduceat(y[rows].astype(np.int64), starts, axis=0)
        return bool(((have == 0) | (have == counts[:, None])).all(axis=0).any())
    if column.kind != "number":
        return False
    ordered = y[np.argsort(values, kind="stable")]
    return bool(((np.diff(ordered, axis=0) != 0).sum(axis=0) == 1).any())


def _backwards(column: Column, values: npt.NDArray[Any], parts: Mapping[str, Indices]) -> str:
    when = {part: dates.seconds(values[rows], column.format) for part, rows in parts.items()}
    known = when["test"][np.isfinite(when["test"])]
    last = np.nanmax(when["train"], initial=-np.inf)
    older = int((known < last).sum())
    if not older:
        return ""
    return (
        f"time runs backwards: by {column.name!r}, {older:,} of {len(known):,} test rows are older "
        "than the newest training row: if the model is for times to come, set data.split.time: "
        f"{column.name}"
    )


def _shared_groups(
    groups: npt.NDArray[Any] | None, parts: Mapping[str, Indices], name: str | None
) -> str:
    if groups is None:
        return ""
    shared = set(groups[parts["test"]]) & set(groups[parts["train"]])
    if not shared:
        return ""
    return (
        f"{len(shared):,} values of {name!r} are in the training and in the test split, which the "
        "source gives: set data.split.test to a share, and groups stay whole"
    )
