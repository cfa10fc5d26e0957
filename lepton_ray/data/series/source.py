"""A file of values over time: read, checked and put on a regular grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import SeriesData
from lepton_ray.data import frames
from lepton_ray.data.hands import Hands
from lepton_ray.data.interactions.source import id_text, shown
from lepton_ray.data.series.clock import Clock, Times, guess
from lepton_ray.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series, regular from its first time to its last."""

    id: str
    first: np.datetime64
    values: Floats
    """[steps] NaN where nothing was measured (``gaps: mask``) or the time is to come."""
    known: Floats
    """[steps, known covariates]"""
    past: Floats
    """[steps, past covariates]"""
    length: int
    """Steps up to the last one that was measured; what is behind holds known covariates only."""
    gaps: int
    """Steps before that which the source has no value for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    clock: Clock
    series: tuple[Series, ...]
    notes: tuple[str, ...]

    def times(self, number: int) -> Times:
        """Of all steps of one series."""
        one = self.series[number]
        return self.clock.shift(np.full(len(one.values), one.first), np.arange(len(one.values)))


def read(data: SeriesData, hands: Hands | None = None) -> Source:
    """The series of a source.

    Raises:
        DataError: for missing columns, times that are none, unsorted, repeated, between two steps
            or left out, and values that are no numbers.
    """
    frame = frames.read(data.source, [data.id] if data.id else [], hands=hands)
    if len(frame) == 0:
        raise DataError(f"data.source {data.source!r} holds no rows")
    covariates = [*data.covariates.known, *data.covariates.past]
    for name in [data.time, data.target, data.id, *covariates]:
        if name is not None and name not in frame.columns:
            raise DataError(
                f"{data.source}: no column {name!r}, {nearest(name, map(str, frame.columns))}"
            )
    frame = frame.assign(**{data.time: times_of(data.source, frame[data.time])})
    for name in [data.target, *covariates]:
        frame[name] = _numbers(data, frame[name])
    if data.id is None:
        groups = [("", frame)]
    else:
        ids = frame[data.id].map(id_text)
        groups = [(str(id_), some) for id_, some in frame.groupby(ids, sort=True)]
    notes: list[str] = []
    ordered = [(id_, _ordered(data, id_, some, notes)) for id_, some in groups]
    text = data.frequency or _frequency(data, [some for _, some in ordered])
    clock = Clock(text)
    series = tuple(_regular(data, clock, id_, some, covariates) for id_, some in ordered)
    gaps, steps = sum(one.gaps for one in series), sum(one.length for one in series)
    if gaps:
        done = "filled with the last value" if data.preprocess.gaps == "last" else "masked"
        notes.append(f"{gaps:,} of {steps:,} times have no value and are {done}")
    return Source(clock=clock, series=series, notes=tuple(notes))


def times_of(source: str, values: pd.Series) -> pd.Series:
    """Times without a zone, those with an offset in UTC.

    Raises:
        DataError: naming the first that is none.
    """
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values):
        raise DataError(
            f"{source}: the times in {values.name!r} must be dates, such as 2024-01-31 13:00, but "
            f"are numbers, such as {shown(values.iloc[0])}: convert them"
        )
    found = pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601")
    bad = np.flatnonzero(found.isna())
    if len(bad):
        raise DataError(
            f"{source}: {len(bad)} of {len(values)} times in {values.name!r} are no dates, the "
            f"first is {shown(values.iloc[bad[0]])} in row {bad[0]}: write all of them as "
            "2024-01-31 or 2024-01-31 13:00"
        )
    return found.dt.tz_localize(None).astype("datetime64[s]")


def _numbers(data: SeriesData, values: pd.Series) -> pd.Series:
    """Numbers, NaN for an empty cell."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    numbers = numbers.where(np.isfinite(numbers))
    bad = np.flatnonzero(numbers.isna() & values.notna())
    if len(bad):
        raise DataError(
            f"{data.source}: {len(bad)} of {len(values)} values of {values.name!r} are not finite "
            f"numbers, the first is {shown(values.iloc[bad[0]])} in row {bad[0]}: repair or empty "
            "them"
        )
    return numbers


def _where(data: SeriesData, id_: str) -> str:
    return f"{data.source}: series {id_!r}" if data.id else data.source


def _ordered(data: SeriesData, id_: str, frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Rows by time, one for each."""
    times, how = frame[data.time], data.preprocess
    where = _where(data, id_)
    if not times.is_monotonic_increasing:
        if how.unsorted == "refuse":
            row = int(np.flatnonzero(np.diff(times.to_numpy()) < np.timedelta64(0))[0])
            raise DataError(
                f"{where}: times must rise, but {times.iloc[row]} is followed by "
                f"{times.iloc[row + 1]}: sort the rows, or set data.preprocess.unsorted: sort"
            )
        frame = frame.sort_values(data.time, kind="stable")
        times = frame[data.time]
    repeated = times.duplicated()
    if repeated.any():
        n = int(repeated.sum())
        if how.repeated == "refuse":
            raise DataError(
                f"{where}: {n:,} of {len(frame):,} times are repeated, the first is "
                f"{times[repeated].iloc[0]}: keep one row of each, or set "
                "data.preprocess.repeated: first, last or mean"
            )
        of = f"of series {id_!r} " if data.id else ""
        notes.append(f"{n:,} of {len(frame):,} rows {of}repeat a time; kept: {how.repeated}")
        if how.repeated == "mean":
            numbers = [data.target, *data.covariates.known, *data.covariates.past]
            frame = frame.groupby(data.time, as_index=False)[numbers].mean()
        else:
            frame = frame.drop_duplicates(data.time, keep=how.repeated)
    return frame


def _frequency(data: SeriesData, frames: list[pd.DataFrame]) -> str:
    longest = max(frames, key=len)
    if len(longest) < 2:
        raise DataError(f"{data.source}: a series must have two times, but has {len(longest)}")
    return guess(longest[data.time].to_numpy())


def _regular(
    data: SeriesData, clock: Clock, id_: str, frame: pd.DataFrame, covariates: list[str]
) -> Series:
    where, how = _where(data, id_), data.preprocess.gaps
    measured = np.flatnonzero(frame[data.target].notna())
    if len(measured) == 0:
        raise DataError(f"{where}: all values of {data.target!r} are missing: leave it out")
    frame = frame.iloc[measured[0] :]
    times: Times = frame[data.time].to_numpy()
    positions = clock.positions(times)
    between = np.flatnonzero(positions % 1)
    if len(between):
        raise DataError(
            f"{where}: times must be {clock.text} apart, but {times[between[0]]} lies between two "
            f"steps counted from {times[0]}: round the times, or name another data.frequency "
            "(a shorter one)"
        )
    at = positions.astype(np.int64)
    last = at[measured[-1] - measured[0]]
    values, *others = (
        _spread(frame[name].to_numpy(dtype=np.float64), at) for name in [data.target, *covariates]
    )
    absent = np.isnan(values[: last + 1])
    if absent.any() and how == "refuse":
        first = int(absent.argmax())
        raise DataError(
            f"{where}: {int(absent.sum()):,} of {last + 1:,} times have no value, the first is "
            f"{clock.shift(times[:1], first)[0]}: fill them, or set data.preprocess.gaps: last "
            "(the last value before) or mask (no part in loss and metrics)"
        )
    if how == "last":
        values[: last + 1] = filled(values[None, : last + 1])[0]
    known = len(data.covariates.known)
    for position, (name, column) in enumerate(zip(covariates, others, strict=True)):
        length = len(column) if position < known else last + 1
        column[length:] = 0.0
        missing = np.isnan(column[:length])
        if missing.any() and how == "refuse":
            raise DataError(
                f"{where}: the covariate {name!r} has no value at {int(missing.sum()):,} of "
                f"{length:,} times: fill them, or set data.preprocess.gaps: last or mask"
            )
        column[:length] = filled(column[None, :length])[0]
    columns = np.stack(others, axis=1) if others else np.zeros((len(values), 0))
    return Series(
        id=id_,
        first=times[0],
        values=values,
        known=columns[:, :known],
        past=columns[:, known:],
        length=int(last) + 1,
        gaps=int(absent.sum()),
    )


def _spread(values: Floats, at: npt.NDArray[np.int64]) -> Floats:
    whole = np.full(at[-1] + 1, np.nan)
    whole[at] = values
    return whole


def filled(values: Floats) -> Floats:
    """[n, steps] With the last number before each NaN; the first one before all, 0 for none."""
    there = ~np.isnan(values)
    steps = np.arange(values.shape[1])
    last = np.maximum.accumulate(np.where(there, steps, -1), axis=1)
    last = np.where(last < 0, there.argmax(axis=1)[:, None], last)
    found = np.take_along_axis(values, last, axis=1)
    return np.where(np.isnan(found), 0.0, found)
