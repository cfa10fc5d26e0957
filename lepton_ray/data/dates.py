"""Dates as texts and as seconds: ISO 8601, or a format that the experiment names."""

from __future__ import annotations

import datetime
import re
from typing import Any

import numpy as np
import numpy.typing as npt

ISO = ""
"""Format of a date that names none: 2024-01-31, or 2024-01-31T10:00:00 also with an offset."""
# What Python and pandas read alike; of other forms each takes some that the other does not.
_USUAL = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?(Z|[+-]\d\d:\d\d)?", re.ASCII
)

_FINER = re.compile(r"([.,]\d{6})\d+")


def seconds(texts: Any, format: str) -> npt.NDArray[np.float64]:
    """[n] Since 1970 in UTC; NaN for an empty text, and for one that is no date."""
    import pandas as pd

    given = pd.Series(np.asarray(texts, object))
    given = given.where(given != "", None)
    asked: dict[str, Any] = {"format": format or "ISO8601", "errors": "coerce", "utc": True}
    parsed = pd.to_datetime(given, **asked)
    # Microseconds: with more digits in one text pandas reads all of them in nanoseconds, which end
    # in the year 2262.
    if not format and parsed.dt.unit == "ns":
        parsed = pd.to_datetime(given.str.replace(_FINER, r"\1", regex=True), **asked)
    moments = parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")
    numbers: npt.NDArray[np.float64] = (moments - np.datetime64(0, "us")) / np.timedelta64(1, "s")
    return numbers


def problem(text: object, format: str) -> str:
    """The rule a date breaks; empty for one that can be taken."""
    like = f"in the form {format}" if format else "such as 2024-01-31 or 2024-01-31T10:00:00"
    rule = f"must be a date {like}"
    if not isinstance(text, str):
        return rule
    try:
        if format:
            datetime.datetime.strptime(text, format)
            return ""
        datetime.datetime.fromisoformat(text)
        usual = _USUAL.fullmatch(text) is not None
    except ValueError:
        if format:
            return rule
        usual = False
    # What is a date is for `seconds` to say, which takes a thousand times as long.
    return "" if usual or np.isfinite(seconds([text], ISO)[0]) else rule
