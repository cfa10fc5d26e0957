"""Several labels a row: columns of 0 and 1, cells of labels with something between, or lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import TableData, TextData
from lepton_ray.data import tables
from lepton_ray.data.tables import MAX_CATEGORIES
from lepton_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Truth = npt.NDArray[np.bool_]
"""[n, labels] Whether a row has a label."""

LISTS = (list, tuple, np.ndarray)
SAYS = {"0": False, "1": True, "false": False, "true": True}


def read(data: TableData | TextData, frame: pd.DataFrame) -> tuple[tuple[str, ...], Truth] | None:
    """The labels by name and which of them each row has; None where a row has one class or number.

    Raises:
        DataError: for a cell that says something else, and see `check`.
    """
    if isinstance(data.target, tuple):
        names: tuple[str, ...] = data.target
        truth = np.stack([_column(data, name, frame[name]) for name in names], axis=1)
    else:
        if data.separator is None and not _has_lists(frame[data.target]):
            return None
        if isinstance(data, TableData) and data.task == "regression":
            raise DataError(
                f"{data.source}: {data.target!r} holds lists of labels, but data.task is "
                "regression: leave it out, or name a column of numbers in data.target"
            )
        found = _cells(data, data.target, frame[data.target])
        names, truth = found
    check(str(data.source), names, truth)
    return names, truth


def check(source: str, names: Sequence[str], truth: Truth) -> None:
    """
    Raises:
        DataError: for labels that are too many or too few, or which all rows have, or none.
    """
    if not len(truth):
        return  # that there are no samples is told for all kinds
    if len(names) > MAX_CATEGORIES:
        raise DataError(
            f"{source}: a row has some of at most {MAX_CATEGORIES} labels, but there are "
            f"{len(names)}: take the rare ones out of the target"
        )
    if len(names) < 2:
        raise DataError(
            f"{source}: several labels are at least two, but there is {list(names)}: look at "
            "data.separator, or name a column of classes in data.target"
        )
    counts = truth.sum(axis=0)
    alike = np.flatnonzero((counts == 0) | (counts == len(truth)))
    if len(alike):
        first = int(alike[0])
        raise DataError(
            f"{source}: {'no row has' if counts[first] == 0 else 'every row has'} the label "
            f"{names[first]!r}, so there is nothing to learn of it ({len(alike)} such labels): "
            "take it out of the target"
        )


def _column(data: TableData | TextData, name: str, values: pd.Series) -> npt.NDArray[np.bool_]:
    """[n] What a column of 0 and 1 says."""
    texts = np.char.lower(tables.as_texts(values).astype(np.str_))
    distinct, inverse = np.unique(texts, return_inverse=True)
    said = [SAYS.get(text) for text in distinct]
    if None in said:
        at = said.index(None)
        (row, *_) = np.flatnonzero(inverse == at)
        raise DataError(
            f"{data.source}: a column of labels says 0 or 1, false or true in every row, but "
            f"{name!r} says {repr(str(distinct[at])) if distinct[at] else 'nothing':.80} in row "
            f"{row}: repair it, or take it out of data.target"
        )
    result: npt.NDArray[np.bool_] = np.array(said, np.bool_)[inverse]
    return result


def _cells(
    data: TableData | TextData, name: str, values: pd.Series
) -> tuple[tuple[str, ...], Truth]:
    """What cells with several labels say."""
    cells = values.tolist()
    listed = any(map(_is_list, cells))
    rows = [_of_cell(data, name, row, cell, listed) for row, cell in enumerate(cells)]
    counts = Counter(label for row in rows for label in row)
    names = tuple(sorted(counts))
    at = {label: position for position, label in enumerate(names)}
    # More are refused, and might be as many as would not fit.
    truth = np.zeros((len(rows), min(len(names), MAX_CATEGORIES + 1)), np.bool_)
    if len(names) <= MAX_CATEGORIES:
        for number, row in enumerate(rows):
            truth[number, [at[label] for label in row]] = True
    return names, truth


def _has_lists(values: pd.Series) -> bool:
    return values.dtype == object and bool(values.map(_is_list).any())


def _is_list(cell: Any) -> bool:
    return isinstance(cell, LISTS)


def _of_cell(
    data: TableData | TextData, name: str, row: int, cell: Any, listed: bool
) -> frozenset[str]:
    if _is_list(cell):
        if data.separator is not None:
            raise DataError(
                f"{data.source}: {name!r} holds lists, which need no separator: leave out "
                "data.separator"
            )
        wrong = [one for one in cell if not isinstance(one, str)]
        if wrong:
            raise DataError(
                f"{data.source}: a list of labels holds texts, but that of {name!r} in row {row} "
                f"holds {wrong[0]!r:.80}: write it as a text"
            )
        pieces: Sequence[str] = list(cell)
    elif cell is None or cell != cell or cell == "":
        pieces = []
    elif listed:
        raise DataError(
            f"{data.source}: {name!r} holds lists of labels, but row {row} has {cell!r:.80}: write "
            "it as a list"
        )
    else:
        pieces = str(cell).split(data.separator)
    return frozenset(piece.strip() for piece in pieces) - {""}
