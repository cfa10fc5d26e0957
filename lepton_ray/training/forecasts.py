"""How good a forecast is, and what it must be better than."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.series.fit import SeriesFit
from lepton_ray.data.series.load import Windows

Floats = npt.NDArray[np.float64]

SHOWN = 5  # steps ahead, from the first to the last, that the error is also told for alone
MOST_WINDOWS = 8_000  # of the linear baseline
MOST_ROWS = 100_000  # of gradient boosting: a row for each step ahead of a window
STRENGTHS = (1.0, 100.0, 10_000.0)  # of its regularisation; the validation split chooses
CHUNK = 1024  # windows that are held as numbers at a time


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error in units of the series' deviation; what was not measured has no part."""
    measured = ~y.isnan()
    error = (outputs - y.nan_to_num()).abs() * measured
    return error.sum() / measured.sum().clamp(min=1)


def answers(outputs: Tensor, samples: Samples) -> Floats:
    """[n, horizon] In the target's unit."""
    assert isinstance(samples, Windows)
    return samples.fitted.unscale(outputs.cpu().numpy(), samples.series)


def measure(values: npt.NDArray[np.floating], samples: Samples) -> dict[str, float]:
    """``mae`` and ``rmse`` in the target's unit, ``smape`` (of 2), ``mase`` (in errors of repeating
    the last season in the training part), ``loss`` (the mean error in units of the series'
    deviation), and the error some steps ahead, such as ``mae_h1``.

    Args:
        values: [n, horizon] forecast
    """
    assert isinstance(samples, Windows)
    tensors, series = samples.fitted.tensors, samples.series
    y = samples.y[:]
    measured = ~np.isnan(y)
    error = np.where(measured, np.abs(values - np.where(measured, y, 0.0)), 0.0)
    count = int(measured.sum())
    size = np.where(measured, np.abs(values) + np.abs(np.nan_to_num(y)), 1.0)
    relative = 2 * error / np.where(size > 0, size, 1.0)
    found = {
        "loss": float((error / tensors["deviation"][series][:, None]).sum() / count),
        "mae": float(error.sum() / count),
        "rmse": float((error**2).sum() / count) ** 0.5,
        "smape": float(relative.sum() / count),
        "mase": float((error / tensors["naive"][series][:, None]).sum() / count),
    }
    horizon = error.shape[1]
    for step in sorted({round(s) for s in np.linspace(1, horizon, min(SHOWN, horizon))}):
        at = measured[:, step - 1].sum()
        if at:
            found[f"mae_h{step}"] = float(error[:, step - 1].sum() / at)
    return found


def baselines(dataset: Dataset, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics of ``baseline`` (the mean of each time of the week in the training part),
    ``linear`` (ridge regression on a window) and ``boosting`` (on the calendar and what was a day
    and a week before)."""
    train, validation, test = dataset.train, dataset.validation, dataset.test
    assert isinstance(train, Windows)
    assert isinstance(validation, Windows)
    assert isinstance(test, Windows)
    found = {
        "baseline": _seasonal_mean(train, test),
        "linear": _linear(train, validation, test, seed),
        "boosting": _boosting(train, test, seed),
    }
    return {name: measure(values, test) for name, values in found.items()}


def _seasonal_mean(train: Windows, test: Windows) -> Floats:
    fitted, track = train.fitted, train.track
    clock = fitted.clock
    slots = int(clock.slots(_every_time(train)).max()) + 1
    means = np.zeros((len(track.first), slots))
    for number, (first, begin) in enumerate(zip(track.first, track.begins, strict=True)):
        of_it = train.ends[train.series == number]
        overall = fitted.tensors["mean"][number]
        means[number] = overall
        if len(of_it) == 0:
            continue
        steps = np.arange(int(of_it.max()) + fitted.horizon + 1 - int(begin))
        values = track.values[begin + steps]
        there = ~np.isnan(values)
        at = clock.slots(clock.shift(np.full(len(steps), first), steps))[there]
        count = np.bincount(at, minlength=slots)
        total = np.bincount(at, values[there], slots)
        means[number] = np.where(count > 0, total / np.maximum(count, 1), overall)
    everything = np.arange(len(test))
    return means[test.series[:, None], clock.slots(test.times(everything))]


def _every_time(train: Windows) -> Any:
    clock = train.fitted.clock
    return clock.shift(np.full(500, train.track.first[0]), np.arange(500))


def _linear(train: Windows, validation: Windows, test: Windows, seed: int) -> Floats:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(train))[:MOST_WINDOWS])
    some = np.sort(rng.permutation(len(validation))[:MOST_WINDOWS])
    x, y = _flat(train, rows), _scaled(train, rows)
    # What was not measured is taken for the series' mean: Ridge has no weights for single numbers.
    y = np.nan_to_num(y)
    seen, truth = _flat(validation, some), _scaled(validation, some)
    best, best_error = None, np.inf
    for strength in STRENGTHS:
        model = Ridge(alpha=strength).fit(x, y)
        error = float(np.nanmean(np.abs(model.predict(seen) - truth)))
        if error < best_error:
            best, best_error = model, error
    assert best is not None
    parts = [best.predict(_flat(test, part)) for part in _parts(len(test))]
    return test.fitted.unscale(np.concatenate(parts).reshape(len(test), -1), test.series)


def _flat(windows: Windows, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """[n, features] The history's values, and at each step ahead what is known."""
    x, fitted = windows.x[rows], windows.fitted
    known = x[:, x.shape[1] - fitted.window.known :, fitted.history :]
    parts = [x[:, 0, : fitted.history], known.reshape(len(x), -1)]
    return np.concatenate(parts, axis=1)


def _scaled(windows: Windows, rows: npt.NDArray[np.int64]) -> Floats:
    return windows.fitted.scale(windows.y[rows], windows.series[rows])


def _boosting(train: Windows, test: Windows, seed: int) -> Floats:
    from sklearn.ensemble import HistGradientBoostingRegressor

    horizon = train.fitted.horizon
    rows = np.random.default_rng(seed).permutation(len(train))[: max(1, MOST_ROWS // horizon)]
    rows = np.sort(rows)
    x, y = _steps(train, rows), _scaled(train, rows).reshape(-1)
    there = ~np.isnan(y)
    model = HistGradientBoostingRegressor(loss="absolute_error", random_state=seed)
    model.fit(x[there], y[there])
    parts = [model.predict(_steps(test, part)) for part in _parts(len(test))]
    return test.fitted.unscale(np.concatenate(parts).reshape(len(test), horizon), test.series)


def _steps(windows: Windows, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """[n * horizon, features] Of each step ahead: which it is, the series, what is known of the
    time, the last values, and the values one and seven seasons before it."""
    fitted: SeriesFit = windows.fitted
    history, horizon, season = fitted.history, fitted.horizon, fitted.clock.season
    x = windows.x[rows]
    values = np.where(x[:, 1, :history] > 0, x[:, 0, :history], np.nan)
    ahead = np.arange(horizon)
    features = [np.broadcast_to(ahead, (len(x), horizon)), np.repeat(x[:, 2, :1], horizon, 1)]
    for back in (1, 2, 3):
        last = values[:, max(0, history - back)]
        features.append(np.repeat(last[:, None], horizon, 1))
    features.append(np.repeat(x[:, 0, :history].mean(1, keepdims=True), horizon, 1))
    for seasons in (1, 7):
        # The latest whole number of seasons back that the history reaches.
        lag = season * seasons
        at = history + ahead - lag * -(-(ahead + 1) // lag)
        if at.max() < 0:
            continue
        features.append(np.where(at >= 0, values[:, np.maximum(at, 0)], np.nan))
    known = x[:, x.shape[1] - fitted.window.known :, history:]
    stacked = np.concatenate([np.stack(features, axis=-1), np.moveaxis(known, 1, -1)], axis=-1)
    return stacked.reshape(len(x) * horizon, -1).astype(np.float32)


def _parts(n: int) -> list[npt.NDArray[np.int64]]:
    return [np.arange(at, min(at + CHUNK, n)) for at in range(0, n, CHUNK)]
