"""A window of a series as numbers: scales fitted on the training part, and the calendar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from lepton_ray.data.schema import Column
from lepton_ray.data.series.clock import Clock, Times
from lepton_ray.data.series.source import filled

FORMAT = 1
VALUE, MEASURED, SERIES = 0, 1, 2  # the first channels of a sample
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the data tell a model of series.

    A sample is [channels, history + horizon]: the value (0 in the horizon, and where nothing was
    measured the last one before), whether it was measured, the number of the series, the past
    covariates (0 in the horizon), and what is known of all times: covariates, then the calendar.
    """

    history: int
    horizon: int
    series: int
    past: int
    known: int
    """Covariates and the calendar."""


@dataclass(frozen=True, kw_only=True)
class SeriesFit:
    """See `fitted.Fitted`."""

    columns: tuple[Column, ...]
    """The time of the last value, the values up to it, the covariates, and the id if there is."""
    clock: Clock
    history: int
    horizon: int
    known: tuple[str, ...]
    past: tuple[str, ...]
    masked: bool = True
    """Whether the model is told where a value was filled in (``gaps: mask``)."""
    tensors: Mapping[str, npt.NDArray[np.float64]]
    """``mean``, ``deviation`` and ``naive`` (the mean error of repeating the last season) of each
    series, ``covariate_mean`` and ``covariate_deviation`` of the known and past covariates."""

    @property
    def window(self) -> Window:
        return Window(
            history=self.history,
            horizon=self.horizon,
            series=len(self.tensors["mean"]),
            past=len(self.past),
            known=len(self.known) + self.clock.features,
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"window": self.window}

    @property
    def input_shape(self) -> tuple[int, ...]:
        window = self.window
        return (3 + window.past + window.known, self.history + self.horizon)

    @property
    def target_deviation(self) -> float:
        """The smallest of the series' deviations."""
        return float(self.tensors["deviation"].min())

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the series, by number; none where there is one."""
        return next((c.categories for c in self.columns if c.kind == "id"), ())

    def apply(self, columns: Mapping[str, Any]) -> Floats:
        """[n, *input_shape] of checked columns, see `columns`."""
        time, target = self.columns[:2]
        last = np.asarray(columns[time.name]).astype("datetime64[s]")
        steps = np.arange(1 - self.history, self.horizon + 1)
        times = self.clock.shift(last[:, None], steps)
        values = np.asarray(columns[target.name], np.float64).reshape(len(last), self.history)
        series = np.zeros(len(last), np.int64)
        if self.ids:
            numbers = {id_: number for number, id_ in enumerate(self.ids)}
            name = next(c.name for c in self.columns if c.kind == "id")
            series = np.array([numbers[id_] for id_ in columns[name]], np.int64)
        known, past = (
            np.stack([np.asarray(columns[n], np.float64) for n in names], axis=-1)
            if names
            else np.zeros((len(last), length, 0))
            for names, length in (
                (self.known, self.history + self.horizon),
                (self.past, self.history),
            )
        )
        return self.pack(values, known, past, self.clock.calendar(times), series)

    def pack(
        self,
        values: npt.NDArray[np.float64],
        known: npt.NDArray[np.float64],
        past: npt.NDArray[np.float64],
        calendar: Floats,
        series: npt.NDArray[np.int64],
    ) -> Floats:
        """[n, *input_shape]

        Args:
            values: [n, history] NaN where nothing was measured
            known: [n, history + horizon, known covariates]
            past: [n, history, past covariates]
            calendar: [n, history + horizon, features]
            series: [n] numbers
        """
        mean, deviation = (self.tensors[f"covariate_{k}"] for k in ("mean", "deviation"))
        split, history = len(self.known), self.history
        x = np.zeros((len(values), *self.input_shape), np.float32)
        # Too large for float32 becomes infinite, and the answer is refused for it.
        with np.errstate(over="ignore"):
            x[:, VALUE, :history] = self.scale(filled(values), series)
            x[:, MEASURED, :history] = ~np.isnan(values) if self.masked else 1.0
            x[:, SERIES] = series[:, None]
            at = SERIES + 1 + len(self.past)
            x[:, SERIES + 1 : at, :history] = np.moveaxis(
                (past - mean[split:]) / deviation[split:], -1, 1
            )
            x[:, at : at + split] = np.moveaxis((known - mean[:split]) / deviation[:split], -1, 1)
        x[:, at + split :] = np.moveaxis(calendar, -1, 1)
        return x

    def scale(
        self, values: npt.NDArray[np.float64], series: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """[n, steps] In units of each series' deviation."""
        mean, deviation = self.tensors["mean"][series], self.tensors["deviation"][series]
        scaled: npt.NDArray[np.float64] = (values - mean[:, None]) / deviation[:, None]
        return scaled

    def unscale(
        self, outputs: npt.NDArray[np.floating], series: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """The inverse of `scale`."""
        mean, deviation = self.tensors["mean"][series], self.tensors["deviation"][series]
        return outputs.astype(np.float64) * deviation[:, None] + mean[:, None]

    def restore(
        self, outputs: npt.NDArray[np.floating], x: npt.NDArray[Any]
    ) -> npt.NDArray[np.floating]:
        """[n, horizon] In the target's unit."""
        return self.unscale(outputs, x[:, SERIES, 0].astype(np.int64))

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""
        value = {
            "format": FORMAT,
            "kind": "series",
            "frequency": self.clock.text,
            "history": self.history,
            "horizon": self.horizon,
            "known": self.known,
            "past": self.past,
            "masked": self.masked,
            "columns": [asdict(c) for c in self.columns],
        }
        (folder / "preprocess.json").write_text(json.dumps(value, indent=1))
        save_file(dict(self.tensors), folder / "preprocess.safetensors")

    @staticmethod
    def load(folder: Path) -> SeriesFit:
        """Read what `save` wrote."""
        value = json.loads((folder / "preprocess.json").read_text())
        return SeriesFit(
            columns=tuple(map(Column.from_json, value["columns"])),
            clock=Clock(value["frequency"]),
            history=value["history"],
            horizon=value["horizon"],
            known=tuple(value["known"]),
            past=tuple(value["past"]),
            masked=value.get("masked", True),
            tensors=load_file(folder / "preprocess.safetensors"),
        )


def last_times(clock: Clock, first: Times, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
    """[n] Each as a person writes it: the time ``ends`` steps after ``first``."""
    return np.array([*map(str, clock.shift(first, ends)), None], object)[:-1]
