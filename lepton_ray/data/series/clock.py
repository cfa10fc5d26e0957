"""Regular times: how far apart they are, and what they say of day, week and year."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.errors import DataError

Times = npt.NDArray[np.datetime64]
"""In seconds, of UTC or of no time zone."""

DAY_S = 86_400
WEEK_S = 7 * DAY_S
YEAR_S = 365.25 * DAY_S
HARMONICS = {"day": 4, "year": 2}
UNITS = {"D": DAY_S, "h": 3600, "min": 60, "s": 1}
_YEAR_FIRST = re.compile(r"\s*\d{4}(\D|\d\d|$)")
EXAMPLES = "as pandas writes it, such as h, 15min, D, 7D, or MS for months"


@dataclass(frozen=True)
class Clock:
    """A frequency: some seconds, or one month."""

    text: str

    def __post_init__(self) -> None:
        self.step_s  # noqa: B018  (raises for a text that is none)

    @property
    def monthly(self) -> bool:
        return self.text == "MS"

    @property
    def step_s(self) -> int:
        """Between two times; of a month, about.

        Raises:
            DataError: for a text that is no frequency.
        """
        import pandas as pd

        if self.monthly:
            return 30 * DAY_S
        try:
            delta = pd.Timedelta(self.text if self.text[:1].isdigit() else f"1{self.text}")
            seconds = delta.total_seconds()
        except (ValueError, TypeError):
            seconds = 0
        if seconds < 1 or seconds % 1:
            raise DataError(
                f"data.frequency must be whole seconds or months, {EXAMPLES}, but got {self.text!r}"
            )
        return int(seconds)

    @property
    def season(self) -> int:
        """Steps of a day, of a week for days, of a year for months: what a naive forecast
        repeats."""
        if self.monthly:
            return 12
        if self.step_s < DAY_S:
            return max(1, DAY_S // self.step_s)
        return max(1, WEEK_S // self.step_s)

    def positions(self, times: Times) -> npt.NDArray[np.float64]:
        """[n] Steps since the first time; not whole for one that is between two steps."""
        if not self.monthly:
            steps: npt.NDArray[np.float64] = (times - times[0]).astype(np.float64) / self.step_s
            return steps
        months = times.astype("datetime64[M]")
        inside = times - months.astype("datetime64[s]")
        off = (inside != inside[0]) * 0.5
        whole: npt.NDArray[np.float64] = (months - months[0]).astype(np.float64) + off
        return whole

    def shift(self, times: Times, steps: Any) -> Times:
        """Each time some steps later."""
        if not self.monthly:
            return times + np.asarray(steps) * np.timedelta64(self.step_s, "s")
        months = times.astype("datetime64[M]")
        later = (months + np.asarray(steps)).astype("datetime64[s]")
        moved: Times = later + (times - months.astype("datetime64[s]"))
        return moved

    @property
    def features(self) -> int:
        """How many numbers `calendar` gives for a time."""
        return int(self.calendar(np.zeros(1, "datetime64[s]")).shape[-1])

    def calendar(self, times: Times) -> npt.NDArray[np.float32]:
        """[..., features] Waves of the day and the year, and the day of the week."""
        seconds = times.astype(np.int64)
        found = []
        if self.step_s < DAY_S:
            found += _waves(seconds % DAY_S / DAY_S, HARMONICS["day"])
        if self.step_s < WEEK_S:
            weekday = (seconds // DAY_S + 3) % 7  # 1970 began on a Thursday
            found += [(weekday == day).astype(np.float32) for day in range(7)]
        found += _waves(seconds % YEAR_S / YEAR_S, HARMONICS["year"])
        return np.stack(found, axis=-1).astype(np.float32)

    def slots(self, times: Times) -> npt.NDArray[np.int64]:
        """[n] Which of the week's times each is (of the year's, for months)."""
        if self.monthly:
            return times.astype("datetime64[M]").astype(np.int64) % 12
        seconds: npt.NDArray[np.int64] = times.astype(np.int64) % WEEK_S // min(self.step_s, DAY_S)
        return seconds


def _waves(phase: npt.NDArray[Any], most: int) -> list[npt.NDArray[Any]]:
    angles = [2 * np.pi * k * phase for k in range(1, most + 1)]
    return [wave(angle) for angle in angles for wave in (np.sin, np.cos)]


def guess(times: Times) -> str:
    """The frequency that most neighbours in sorted, distinct times have."""
    steps, counts = np.unique(np.diff(times).astype(np.int64), return_counts=True)
    step = int(steps[counts.argmax()])
    days = times.astype("datetime64[D]") - times.astype("datetime64[M]").astype("datetime64[D]")
    if 28 * DAY_S <= step <= 31 * DAY_S and len(np.unique(days)) == 1:
        return "MS"
    unit = next(unit for unit, seconds in UNITS.items() if step % seconds == 0)
    count = step // UNITS[unit]
    return f"{count}{unit}" if count > 1 else unit


def parse(value: Any) -> np.datetime64:
    """A time as text, datetime or timestamp; with an offset in UTC.

    Raises:
        ValueError: for anything else.
    """
    import pandas as pd

    if isinstance(value, bool | int | float):
        raise ValueError("a number is no time")
    if isinstance(value, str) and not _YEAR_FIRST.match(value):
        raise ValueError("a day or a month first is read in one way or the other")
    stamp = pd.Timestamp(value)
    if stamp is pd.NaT:
        raise ValueError("no time")
    if stamp.tzinfo is not None:
        stamp = stamp.tz_convert("UTC").tz_localize(None)
    return np.datetime64(stamp.to_datetime64(), "s")
