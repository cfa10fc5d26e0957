"""From a section of series to windows a model trains on; none is ever copied out as a whole."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import SeriesData
from lepton_ray.data import spread
from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.hands import Hands
from lepton_ray.data.schema import Column, Schema
from lepton_ray.data.series import source
from lepton_ray.data.series.clock import Clock, Times, parse
from lepton_ray.data.series.fit import SeriesFit, last_times
from lepton_ray.data.series.source import Source
from lepton_ray.errors import DataError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Track:
    """All series, one behind the other, and what is known of every time."""

    first: Times
    """[series] The time of each one's first value."""
    begins: Indices
    """[series] Where each one begins."""
    values: npt.NDArray[np.float64]
    """[steps]"""
    known: npt.NDArray[np.float64]
    past: npt.NDArray[np.float64]
    calendar: npt.NDArray[np.float32]
    """[steps, features]"""


@dataclass(frozen=True)
class Rows:
    """Rows of an array that are made when they are asked for."""

    make: Callable[[Indices], Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: slice | Indices) -> Any:
        return self.make(np.arange(self.length)[rows])


@dataclass(frozen=True, kw_only=True)
class Windows(Samples):
    """Of some part of the time."""

    track: Track
    fitted: SeriesFit
    ends: Indices
    """[n] Where in the track the history's last value is."""
    series: Indices
    """[n] Number of the series."""

    def batch(self, rows: Indices, key: int) -> tuple[Any, Any]:
        """x, and y in units of the series' deviation."""
        y = self.fitted.scale(self.y[rows], self.series[rows])
        return self.x[rows], y.astype(np.float32)

    def times(self, rows: Indices) -> Times:
        """[n, horizon] That are forecast."""
        return self._shifted(rows, np.arange(1, self.fitted.horizon + 1))

    def _shifted(self, rows: Indices, steps: Indices) -> Times:
        first, begins = self.track.first[self.series[rows]], self.track.begins[self.series[rows]]
        ends = self.ends[rows] - begins
        return self.fitted.clock.shift(first[:, None], ends[:, None] + steps)


def windows(track: Track, fitted: SeriesFit, ends: Indices, series: Indices) -> Windows:
    """Those whose history ends at ``ends``."""
    back = np.arange(1 - fitted.history, 1)
    ahead = np.arange(1, fitted.horizon + 1)
    whole = np.concatenate([back, ahead])

    def x(rows: Indices) -> Any:
        at, long = ends[rows][:, None] + back, ends[rows][:, None] + whole
        return fitted.pack(
            track.values[at], track.known[long], track.past[at], track.calendar[long], series[rows]
        )

    def y(rows: Indices) -> Any:
        return track.values[ends[rows][:, None] + ahead]

    return Windows(
        x=Rows(x, len(ends)),
        y=Rows(y, len(ends)),
        track=track,
        fitted=fitted,
        ends=ends,
        series=series,
    )


def columns_of(made: Windows) -> dict[str, Any]:
    """Column name -> what a person would send for each window."""
    fitted, track = made.fitted, made.track
    back = np.arange(1 - fitted.history, 1)
    whole = np.arange(1 - fitted.history, fitted.horizon + 1)
    time, target = fitted.columns[:2]

    def of(array: npt.NDArray[np.float64], steps: Indices) -> Rows:
        return Rows(lambda rows: array[made.ends[rows][:, None] + steps], len(made))

    def times(rows: Indices) -> Any:
        at = made.series[rows]
        return last_times(fitted.clock, track.first[at], made.ends[rows] - track.begins[at])

    def ids(rows: Indices) -> Any:
        return np.array([*fitted.ids, None], object)[made.series[rows]]

    columns: dict[str, Any] = {
        time.name: Rows(times, len(made)),
        target.name: of(track.values, back),
    }
    for number, name in enumerate(fitted.known):
        columns[name] = of(track.known[:, number], whole)
    for number, name in enumerate(fitted.past):
        columns[name] = of(track.past[:, number], back)
    for column in fitted.columns:
        if column.kind == "id":
            columns[column.name] = Rows(ids, len(made))
    return columns


def load(data: SeriesData, hands: Hands | None = None) -> Dataset:
    """Read, divide by time, and fit scales on the training part.

    Raises:
        DataError: see `source.read`; and where history and horizon do not fit into a part.
    """
    read = source.read(data, hands)
    bounds = _bounds(data, read)
    fitted = _fit(data, read, bounds[0])
    track = _track(read)
    samples: dict[str, Samples] = {}
    limits = [None, *bounds, None]
    for number, name in enumerate(("train", "validation", "test")):
        ends, series = _ends(data, read, track, limits[number], limits[number + 1])
        if len(ends) == 0:
            raise _too_short(data, read, name, bounds)
        samples[name] = windows(track, fitted, ends, series)
    test = samples["test"]
    assert isinstance(test, Windows)
    n, clock = len(read.series), read.clock
    return Dataset(
        schema=Schema(
            columns=fitted.columns,
            target=data.target,
            task="forecast",
            horizon=data.horizon,
        ),
        preprocess=fitted,
        test_columns=columns_of(test),
        digest=_digest(read, bounds),
        notes=(
            f"{n:,} series, a value every {clock.text}; windows of {data.history} + {data.horizon}",
            f"validation begins at {bounds[0]}, test at {bounds[1]}",
            *read.notes,
        ),
        train=samples["train"],
        validation=samples["validation"],
        test=samples["test"],
    )


def _bounds(data: SeriesData, read: Source) -> tuple[np.datetime64, np.datetime64]:
    """When validation and test begin, in the time that all series span."""
    first = min(one.first for one in read.series)
    lasts = [read.times(n)[one.length - 1] for n, one in enumerate(read.series)]
    end = max(lasts) + np.timedelta64(read.clock.step_s, "s")
    test = _bound(data.split.test, first, end)
    validation = _bound(data.split.validation, first, test)
    if not first < validation < test < end:
        raise DataError(
            f"{data.source}: train, validation and test must follow each other in the time from "
            f"{first} to {max(lasts)}, but validation begins at {validation} and test at {test}: "
            "set data.split.validation and data.split.test to times between"
        )
    return validation, test


def _bound(
    share: float | datetime.datetime, first: np.datetime64, end: np.datetime64
) -> np.datetime64:
    if isinstance(share, datetime.datetime):
        return parse(share)
    return end - np.timedelta64(round(share * float((end - first).astype(np.int64))), "s")


def _fit(data: SeriesData, read: Source, end: np.datetime64) -> SeriesFit:
    """Of what was measured before ``end``."""
    means, deviations, naive = [], [], []
    covariates = []
    season = read.clock.season
    for number, one in enumerate(read.series):
        training = int((read.times(number)[: one.length] < end).sum())
        values = one.values[:training]
        covariates.append(np.concatenate([one.known, one.past], axis=1)[:training])
        present = values[~np.isnan(values)]
        if len(present) == 0:
            raise DataError(
                f"{data.source}: {f'series {one.id!r}' if data.id else 'the series'} has no value "
                f"before {end}, where validation begins: leave it out, or begin later"
            )
        means.append(present.mean())
        deviations.append(float(spread.deviation(present)))
        steps = np.abs(values[season:] - values[:-season]) if len(values) > season else values[:0]
        steps = steps[~np.isnan(steps)]
        naive.append(steps.mean() if len(steps) else 0.0)
    stacked = np.concatenate(covariates)
    if max(deviations) == 0:
        raise DataError(
            f"{data.source}: every {data.target!r} of the training part is {means[0]:g}; there is "
            "nothing to learn"
        )
    return SeriesFit(
        columns=_columns(data, read),
        clock=read.clock,
        history=data.history,
        horizon=data.horizon,
        known=data.covariates.known,
        past=data.covariates.past,
        masked=data.preprocess.gaps != "last",
        tensors={
            "mean": np.array(means),
            "deviation": _above_zero(np.array(deviations)),
            "naive": _above_zero(np.array(naive)),
            "covariate_mean": stacked.mean(axis=0),
            "covariate_deviation": _above_zero(spread.deviation(stacked, axis=0)),
        },
    )


def _above_zero(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(values > 0, values, 1.0)


def _columns(data: SeriesData, read: Source) -> tuple[Column, ...]:
    gaps = data.preprocess.gaps != "refuse"
    whole = (data.history + data.horizon,)
    columns = [
        Column(name=data.time, kind="time"),
        Column(name=data.target, kind="series", shape=(data.history,), optional=gaps),
        *(Column(name=name, kind="series", shape=whole) for name in data.covariates.known),
        *(Column(name=n, kind="series", shape=(data.history,)) for n in data.covariates.past),
    ]
    if data.id is not None:
        ids = tuple(one.id for one in read.series)
        columns.append(Column(name=data.id, kind="id", categories=ids, closed=True))
    return tuple(columns)


def _track(read: Source) -> Track:
    clock: Clock = read.clock
    lengths = [len(one.values) for one in read.series]
    return Track(
        first=np.array([one.first for one in read.series], "datetime64[s]"),
        begins=np.cumsum([0, *lengths[:-1]]),
        values=np.concatenate([one.values for one in read.series]),
        known=np.concatenate([one.known for one in read.series]),
        past=np.concatenate([one.past for one in read.series]),
        calendar=np.concatenate(
            [clock.calendar(read.times(number)) for number in range(len(read.series))]
        ),
    )


def _ends(
    data: SeriesData,
    read: Source,
    track: Track,
    begin: np.datetime64 | None,
    end: np.datetime64 | None,
) -> tuple[Indices, Indices]:
    """Windows whose whole horizon lies in a part, and what series they are of.

    The history may reach back into the part before: at that time it is known. Windows of which
    nothing was measured in history or horizon are left out.
    """
    ends, series = [], []
    for number, one in enumerate(read.series):
        times = read.times(number)[: one.length]
        low = 0 if begin is None else int((times < begin).sum())
        high = one.length if end is None else int((times < end).sum())
        found = np.arange(max(low, data.history) - 1, high - data.horizon)
        there = np.concatenate([[0], np.cumsum(~np.isnan(one.values[: one.length]))])
        history = there[found + 1] - there[found + 1 - data.history]
        horizon = there[found + 1 + data.horizon] - there[found + 1]
        found = found[(history > 0) & (horizon > 0)]
        ends.append(found + track.begins[number])
        series.append(np.full(len(found), number))
    return np.concatenate(ends).astype(np.int64), np.concatenate(series).astype(np.int64)


def _too_short(
    data: SeriesData, read: Source, part: str, bounds: tuple[np.datetime64, np.datetime64]
) -> DataError:
    longest = max(one.length for one in read.series)
    if longest < data.history + data.horizon:
        return DataError(
            f"{data.source}: a window takes history + horizon = {data.history} + {data.horizon} "
            f"values, but the longest series has {longest}: set a shorter data.history or "
            "data.horizon"
        )
    return DataError(
        f"{data.source}: the {part} part holds no window of {data.horizon} values to forecast with "
        f"{data.history} before them (validation begins at {bounds[0]}, test at {bounds[1]}, and "
        f"the longest series has {longest} values): set a shorter data.history or data.horizon, "
        "or another data.split"
    )


def _digest(read: Source, bounds: tuple[np.datetime64, np.datetime64]) -> str:
    digest = hashlib.sha256(f"{read.clock.text}|{bounds[0]}|{bounds[1]}".encode())
    for one in read.series:
        digest.update(f"{one.id}|{one.first}|{one.values.shape}|{one.length}".encode())
        for values in (one.values, one.known, one.past):
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
