"""Dates as texts and as seconds: ISO 8601, or a format that the experiment names."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

ISO = ""
"""Format of a date that names none: 2024-01-31, or 2024-01-31T10:00:00 also with an offset."""


def seconds(texts: Any, format: str) -> npt.NDArray[np.float64]:
    """[n] Since 1970 in UTC; NaN for an empty text, and for one that is no date."""
    import pandas as pd

    given = pd.Series(np.asarray(texts, object))
    given = given.where(given != "", None)
    parsed = pd.to_datetime(given, format=format or "ISO8601", errors="coerce", utc=True)
    numbers: npt.NDArray[np.float64] = (
        (parsed - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(dtype=np.float64)
    )
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
        else:
            datetime.datetime.fromisoformat(text)
    except ValueError:
        return rule
    return ""
