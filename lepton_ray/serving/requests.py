"""Rows of a request, checked against a model's columns; the same for Python and HTTP."""

from __future__ import annotations

import datetime
import decimal
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data import dates, words
from lepton_ray.data.interactions.source import id_text
from lepton_ray.data.schema import Column, Schema
from lepton_ray.data.series import clock
from lepton_ray.errors import InputError

Columns = dict[str, npt.NDArray[np.generic]]
SHOWN = 80  # characters of a wrong value that an error repeats
MAX_PROBLEMS = 100  # told at once; a body of millions must not make as many
FINITE = "the numbers of an image must be finite"
ENDLESS = "the model has no finite answer to numbers as large as in this row"
_LISTS: frozenset[type] = frozenset({list})
_NUMBERS: frozenset[type] = frozenset({int, float, bool})
MAX_CATEGORY = 1000  # characters of a category never seen: NumPy gives every row the longest's room


@dataclass(frozen=True)
class Problem:
    row: int
    field: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"row {self.row}, field {self.field!r}: {self.rule}, but got {self.value}"

    def behind(self, rows: int) -> Problem:
        """The same in a longer table, where this many rows come before."""
        return replace(self, row=self.row + rows)


class RowsError(InputError):
    """Rows that do not fit the model's columns; lists the first `MAX_PROBLEMS`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__(problems)

    def __str__(self) -> str:
        return "; ".join(map(str, self.problems))


def columns_of(schema: Schema, rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Column name -> values [n, ...] of rows that fit the schema.

    Raises:
        RowsError: naming row, field, rule and value of what does not fit.
    """
    problems: list[Problem] = []
    known = {c.name for c in schema.columns}
    unknown = f"no such field; known: {', '.join(sorted(known))}"
    values: dict[str, list[Any]] = {c.name: [] for c in schema.columns}
    for position, row in enumerate(rows):
        if len(problems) >= MAX_PROBLEMS:
            break
        if not isinstance(row, Mapping):
            fields = ", ".join(values)
            rule = f"a row is an object with the fields {fields[:SHOWN]}"
            problems.append(Problem(position, "", rule, _shown(row)))
            continue
        if row.keys() != known:
            for name in sorted(row.keys() - known, key=str)[:MAX_PROBLEMS]:
                problems.append(Problem(position, str(name)[:SHOWN], unknown, _shown(row[name])))
        for column in schema.columns:
            values[column.name].append(_value(column, row, position, problems))
    if problems:
        raise RowsError(problems[:MAX_PROBLEMS])
    # In an array of str every text would take the room of the longest.
    objects = ("text", "id", "time")
    kinds = {c.name: np.object_ if c.kind in objects else None for c in schema.columns}
    return {name: np.array(column, kinds[name]) for name, column in values.items()}


def _value(column: Column, row: Mapping[str, Any], position: int, problems: list[Problem]) -> Any:
    if column.lookup and _is_missing(row.get(column.name)):
        return None
    if column.name not in row:
        problems.append(Problem(position, column.name, "this field is required", "none"))
        return None
    value = row[column.name]
    if column.kind == "date" and isinstance(value, datetime.date):  # as Arrow and pandas have it
        value = "" if value != value else value.isoformat()  # NaT is no time, nor itself
    if isinstance(value, decimal.Decimal):  # as Arrow has a database's
        value = float(value)
    if column.kind == "image":
        value = _image(column, value)
        rule = value if isinstance(value, str) else ""
    else:
        rule = _CHECKS[column.kind](column, value)
    if rule:
        problems.append(Problem(position, column.name, rule, _shown(row[column.name])))
        return None
    if column.kind in _PLAIN:
        return _PLAIN[column.kind](value)
    if column.kind != "image" and _is_missing(value):
        return math.nan if column.kind == "number" else ""
    return value


def _is_missing(value: Any) -> bool:
    """Nothing, as JSON and Arrow say it, or as pandas does."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _image(column: Column, value: Any) -> npt.NDArray[np.float32] | str:
    """Its pixels, or the rule that it breaks."""
    rule = f"an image is numbers in nested lists of shape {list(column.shape)}"
    try:
        if isinstance(value, np.ndarray):
            array = value
        elif _all_numbers(value, len(column.shape)):
            array = np.asarray(value, np.float64)
        else:  # a text would be read as a number, or give all the others its own length
            return rule + _no_number(column, value)
    except (TypeError, ValueError, OverflowError):
        return rule
    if array.shape != column.shape:
        return f"{rule} (this has {list(array.shape)})"
    if array.dtype.kind not in "biuf":
        return f"{rule} (this has {array.dtype})"
    low, high = column.low, column.high
    if low is None or high is None:
        if not np.isfinite(array).all():
            return FINITE + _first(array, ~np.isfinite(array))
    elif not (low <= array.min() and array.max() <= high):  # nor of NaN
        if not np.isfinite(array).all():
            return FINITE + _first(array, ~np.isfinite(array))
        outside = _first(array, (array < low) | (array > high))
        return f"the numbers of an image lie between {low:g} and {high:g}{outside}"
    return array.astype(np.float32, copy=False)


def _no_number(column: Column, value: Any) -> str:
    """What in lists of the right shape is no number, and where."""
    inside = np.array(value, object)
    if inside.shape != column.shape:
        return ""
    wrong = [not isinstance(v, int | float | np.number | np.bool_) for v in inside.flat]
    return _first(inside, np.array(wrong)) if any(wrong) else ""


def _first(array: npt.NDArray[Any], wrong: npt.NDArray[np.bool_]) -> str:
    """The first that is wrong, and where."""
    at = np.argwhere(wrong.reshape(array.shape))[0].tolist()
    return f" (this has {_shown(array.item(*at))} at {at})"


def _all_numbers(value: Any, depth: int) -> bool:
    """Whether lists nested so deep hold nothing else."""
    inside = value
    for _ in range(depth - 1):
        if not _all_of(inside, _LISTS):
            break
        inside = list(itertools.chain.from_iterable(inside))
    else:
        if _all_of(inside, _NUMBERS):
            return True
    return _all_some_numbers(value, depth)


def _all_of(values: Any, kinds: frozenset[type]) -> bool:
    return isinstance(values, list) and kinds.issuperset(map(type, values))


def _all_some_numbers(value: Any, depth: int) -> bool:
    """The same where there are tuples, arrays or NumPy's numbers among them, which JSON has not."""
    if depth > 1:
        return isinstance(value, list | tuple) and all(
            _all_some_numbers(v, depth - 1) for v in value
        )
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return all(issubclass(t, int | float | np.number | np.bool_) for t in set(map(type, value)))


def _number_problem(column: Column, value: Any) -> str:
    try:
        if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            return ""
    except OverflowError:  # JSON has whole numbers beyond every float
        pass
    if column.optional:
        return "" if _is_missing(value) else "must be a finite number, or null"
    return "must be a finite number"


def _category_problem(column: Column, value: Any) -> str:
    if _is_missing(value):
        return ""  # the empty category
    if not isinstance(value, str):
        return "must be a text"
    if len(value) > MAX_CATEGORY and value not in column.categories:
        return f"must be a text of at most {MAX_CATEGORY} characters"
    return words.problem(value, len(value))


def _date_problem(column: Column, value: Any) -> str:
    missing = value == "" or _is_missing(value)
    if missing and column.optional:
        return ""
    rule = dates.problem(value, column.format)
    return f"{rule}, or null" if rule and column.optional else rule


def _text_problem(column: Column, value: Any) -> str:
    assert column.longest is not None
    return words.problem(value, column.longest)


def _id_problem(column: Column, value: Any) -> str:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole and not isinstance(value, str):
        return "must be an id: a text or a whole number"
    if isinstance(value, str) and len(value) > MAX_CATEGORY:
        return f"must be an id of at most {MAX_CATEGORY} characters"
    if column.closed and id_text(value) not in column.categories:
        some = ", ".join(column.categories[:5]) + (", ..." if len(column.categories) > 5 else "")
        return f"must be one that the model was trained on ({some})"
    return ""


def _time_problem(column: Column, value: Any) -> str:
    try:
        clock.parse(value)
    except (ValueError, TypeError, OverflowError):
        return "must be a time, such as 2024-01-31T13:00"
    return ""


def _series_problem(column: Column, value: Any) -> str:
    (length,) = column.shape
    may = " or null" if column.optional else ""
    rule = f"must be a list of {length} numbers{may}, the latest last"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return rule
    if len(value) != length:
        return f"{rule} (this has {len(value)})"
    gaps = 0
    for one in value:
        if one is None or (isinstance(one, float) and math.isnan(one)):
            gaps += 1
        elif isinstance(one, bool) or _number_problem(column, one):
            return f"{rule} ({_shown(one)} is none)"
    if gaps and not column.optional:
        return f"{rule} (this has {gaps} gaps)"
    return "must have at least one number" if gaps == length else ""


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "id": id_text,
    "time": lambda value: str(clock.parse(value)),
    "series": lambda value: np.array(value, np.float64),
}
"""From a checked value to what preprocessing takes; of other kinds the value itself."""


_CHECKS = {
    "number": _number_problem,
    "category": _category_problem,
    "date": _date_problem,
    "text": _text_problem,
    "id": _id_problem,
    "time": _time_problem,
    "series": _series_problem,
}


def _shown(value: Any) -> str:
    # An array breaks its lines, and leaves out what is in the middle.
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def row_schema(schema: Schema) -> dict[str, Any]:
    """JSON Schema of one row, for the OpenAPI page."""
    properties: dict[str, Any] = {}
    for column in schema.columns:
        if column.kind == "image":
            item: dict[str, Any] = {"type": "number"}
            if column.low is not None:
                item |= {"minimum": column.low, "maximum": column.high}
            for size in reversed(column.shape):
                item = {"type": "array", "items": item, "minItems": size, "maxItems": size}
            file = {"type": "string", "contentEncoding": "base64", "description": "PNG or JPEG"}
            properties[column.name] = {"anyOf": [item, file]}
        elif column.kind == "number":
            seen = (
                f"seen in training: {column.low:g} to {column.high:g}"
                if column.low is not None
                else ""
            )
            kind: Any = ["number", "null"] if column.optional else "number"
            properties[column.name] = {"type": kind, "description": seen}
        elif column.kind == "date":
            form = column.format or "ISO 8601, such as 2024-01-31 or 2024-01-31T10:00:00"
            kind = ["string", "null"] if column.optional else "string"
            properties[column.name] = {"type": kind, "description": f"a date: {form}"}
        elif column.kind == "text":
            properties[column.name] = {"type": "string", "maxLength": column.longest}
        elif column.kind == "id":
            some = ", ".join(column.categories[:5])
            others = "no others" if column.closed else "others are taken for unknown ones"
            said = f"such as {some}; {others}"
            properties[column.name] = {"type": ["string", "integer"], "description": said}
        elif column.kind == "time":
            said = "of the last value, such as 2024-01-31T13:00; with an offset, taken in UTC"
            properties[column.name] = {"type": "string", "description": said}
        elif column.kind == "series":
            (length,) = column.shape
            one = {"type": ["number", "null"] if column.optional else "number"}
            many = {"type": "array", "items": one, "minItems": length, "maxItems": length}
            properties[column.name] = {**many, "description": "one a step, the latest last"}
        else:
            some = ", ".join(column.categories[:20])
            properties[column.name] = {
                "type": ["string", "null"],
                "description": f"seen in training: {some}",
            }
    return {
        "type": "object",
        "properties": properties,
        "required": [c.name for c in schema.columns if not c.lookup],
        "additionalProperties": False,
    }
