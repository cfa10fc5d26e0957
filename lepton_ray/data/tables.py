"""A table's columns: what each one is, and its values as the preprocessing takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import TableData
from lepton_ray.data import dates, room
from lepton_ray.data.csvs import MISSING
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

MAX_CATEGORIES = 1000
FEW = 20  # distinct texts of which some may look like numbers and all still be categories
MOSTLY = 0.5  # of a column's texts; when more are numbers, the others are taken for mistakes
TRUTH = {"true": 1.0, "false": 0.0}


def columns(data: TableData, frame: pd.DataFrame) -> tuple[dict[str, Any], tuple[Column, ...]]:
    """The features of a table: values by name, and their types, declared or by their values.

    Numbers are of any width with NaN for a gap; categories and dates are texts, empty for a gap.

    Raises:
        DataError: for columns that fit no type, or not the declared one.
    """
    aside = {*data.targets, *data.drop, *(data.split.columns - data.types.keys())}
    names = [name for name in frame.columns if name not in aside]
    for name in data.types:
        if name not in frame.columns:
            close = nearest(name, map(str, names))
            raise DataError(f"{data.source}: data.types names {name!r}, no such column, {close}")
    values: dict[str, Any] = {}
    kinds = []
    for name in names:
        column, values[name] = _column(data, str(name), frame[name])
        kinds.append(column)
    if not kinds:
        raise DataError(f"{data.source}: no feature columns are left beside {data.targets[0]!r}")
    return values, tuple(kinds)


def _column(data: TableData, name: str, values: pd.Series) -> tuple[Column, npt.NDArray[Any]]:
    kind, _, form = data.types.get(name, "").partition(" ")
    kind = kind or guess(values)
    if kind == "number":
        return Column(name=name, kind="number"), numbers(data, name, values)
    if kind == "date":
        texts = as_texts(values)
        found = dates.seconds(texts, form)
        wrong = np.flatnonzero(np.isnan(found) & ~np.isin(texts.astype(np.str_), MISSING))
        if len(wrong):
            rule = dates.problem("", form)
            raise DataError(
                f"{data.source}: a date in column {name!r} {rule}, but {len(wrong)} of "
                f"{len(values)} are not, the first is {texts[wrong[0]]!r:.80} in row {wrong[0]}: "
                f"name their form in data.types: {{{name}: date %d.%m.%Y}}, or repair them"
            )
        return Column(name=name, kind="date", format=form), texts.astype(np.str_)
    at, known = distinct(values)
    if len(known) > MAX_CATEGORIES and name not in data.types:
        raise DataError(
            f"{data.source}: column {name!r} has {len(known)} distinct texts, which looks like an "
            f"id or free text: leave it out with data.drop: [{name}], or take the most frequent "
            f"ones with data.types: {{{name}: category}}"
        )
    if name not in data.types:
        _refuse_mixed(data, name, at, known)
    return Column(name=name, kind="category"), room.take(known.astype(np.str_), at)


def guess(values: pd.Series) -> str:
    """``number``, ``date`` or ``category``, as the values of a column say."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return "number"
    if pd.api.types.is_datetime64_any_dtype(values):
        return "date"
    known = {*distinct(values)[1]} - {*MISSING}
    if not known:
        return "number"  # of which there is none, and it is refused for that
    if all(text.lower() in TRUTH for text in known):
        return "number"
    if not any(dates.problem(text, dates.ISO) for text in known) and not any(
        text.isdecimal() for text in known
    ):
        return "date"
    return "category"


def numbers(data: TableData, name: str, values: pd.Series) -> npt.NDArray[np.float64]:
    """[n] Numbers, NaN for a gap.

    Raises:
        DataError: for a text that is no number.
    """
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        if isinstance(values.dtype, np.dtype):  # as it lies, on disk where it does
            plain: npt.NDArray[np.float64] = values.to_numpy()
            return plain if plain.dtype.kind in "iuf" else plain.astype(np.float64)
        result: npt.NDArray[np.float64] = values.to_numpy(dtype=np.float64, na_value=np.nan)
        return result
    texts = pd.Series(as_texts(values))
    truth = texts.str.lower().map(TRUTH)
    found = truth.fillna(pd.to_numeric(texts, errors="coerce")).to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(np.isnan(found) & ~texts.isin(MISSING).to_numpy())
    if len(wrong):
        raise DataError(_mixed(data, name, texts.iloc[wrong[0]], wrong, len(values)))
    return np.asarray(found, np.float64)


def as_texts(values: pd.Series) -> npt.NDArray[np.object_]:
    """[n] Every value as a text; a gap is the empty one, a whole number has no point."""
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(values):
        texts = values.map(lambda value: value.isoformat(), na_action="ignore")
    elif pd.api.types.is_float_dtype(values):
        texts = values.map(lambda value: f"{value:.0f}" if value % 1 == 0 else str(value))
        texts = texts.where(values.notna(), None)
    else:
        texts = values.map(str, na_action="ignore")
    result: npt.NDArray[np.object_] = texts.astype(object).where(values.notna(), "").to_numpy()
    return result


def distinct(values: pd.Series) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.object_]]:
    """[n] Where each value is among the distinct ones, and those as `as_texts` has them.

    A column of texts is never taken apart into as many objects as it has rows.
    """
    import pandas as pd

    at: npt.NDArray[np.int64]
    texts: npt.NDArray[np.object_]
    if not isinstance(values.dtype, pd.StringDtype):
        at, texts = pd.factorize(as_texts(values))
        return at, texts
    at, known = pd.factorize(values)
    texts = as_texts(pd.Series(known))
    if (at < 0).any():  # gaps
        at = np.where(at < 0, len(texts), at)
        texts = np.append(texts, "")
    return at, texts


def _refuse_mixed(
    data: TableData, name: str, at: npt.NDArray[np.int64], known: npt.NDArray[np.object_]
) -> None:
    """
    Args:
        at, known: see `distinct`.

    Raises:
        DataError: for a column of numbers with some other texts among them.
    """
    import pandas as pd

    given = known != ""
    if given.sum() <= FEW:
        return
    found = pd.to_numeric(pd.Series(known), errors="coerce").to_numpy(dtype=np.float64)
    rows = np.bincount(at, minlength=len(known)) * given
    share = rows[np.isfinite(found)].sum() / rows.sum()
    if MOSTLY < share < 1.0:
        wrong = np.flatnonzero((np.isnan(found) & given)[at])
        raise DataError(_mixed(data, name, known[at[wrong[0]]], wrong, len(at)))


def _mixed(data: TableData, name: str, first: str, wrong: npt.NDArray[Any], total: int) -> str:
    return (
        f"{data.source}: column {name!r} mixes numbers and texts: {len(wrong)} of {total} values "
        f"are no numbers, the first is {first!r:.80} in row {wrong[0]}: repair "
        f"them, leave them empty (data.preprocess.missing), or set data.types: {{{name}: category}}"
    )
