"""What an experiment on interactions or on a series could say, each setting with its reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_ray.data.dataset import Dataset
from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.data.series import clock
from lepton_ray.pipeline.guesses import Guess

if TYPE_CHECKING:
    import pandas as pd

NAMES = {
    "user": r"(user|customer|member|reader|player|client|viewer|student)s?",
    "item": r"(item|product|movie|film|book|article|song|track|game|course)s?",
}
RATINGS = re.compile(r"^(rating|stars|score|grade)s?$", re.IGNORECASE)
TIMES = re.compile(r"^(time|timestamp|date|datetime|date_?time|day|month|hour|ds|when|at)$", re.I)
TARGETS = ("target", "y", "value", "demand", "sales", "volume", "load", "count")
LEAST_ROWS = 60  # of a series
REGULAR = 0.7  # share of its steps that must be the same
HORIZONS = {"MS": 12, "D": 7, "h": 24}
LONGEST = 6  # a window takes at most one part in this many of a series


def interactions(source: str, frame: pd.DataFrame) -> list[Guess] | None:
    """The data section of a file with a column of users and one of items; None for others."""
    found = {}
    for side, pattern in NAMES.items():
        named = re.compile(rf"^{pattern}([_ ]?(id|no|nr))?$", re.IGNORECASE)
        found[side] = next((str(n) for n in frame.columns if named.match(str(n))), None)
    user, item = found["user"], found["item"]
    if user is None or item is None or frame[user].nunique() == len(frame):
        return None
    rating = next(
        (str(n) for n in frame.columns if RATINGS.match(str(n)) and frame[n].dtype.kind in "iuf"),
        None,
    )
    rated = rating is not None and frame[rating].nunique() > 1
    time = next((str(n) for n in frame.columns if TIMES.match(str(n))), None)
    guesses = [
        Guess("data.kind", "interactions", f"{len(frame):,} rows of a user and an item each"),
        Guess("data.source", source),
        Guess("data.user", user, f"{frame[user].nunique():,} ids, by its name"),
        Guess("data.item", item, f"{frame[item].nunique():,} ids, by its name"),
    ]
    if rated:
        guesses.append(Guess("data.rating", rating, "by its name"))
    if time is not None:
        guesses.append(Guess("data.time", time, "by its name"))
    task = ("rating", "there are ratings") if rated else ("ranking", "there are no ratings")
    return [*guesses, Guess("data.task", *task)]


def series(source: str, frame: pd.DataFrame, target: str | None) -> list[Guess] | None:
    """The data section of a file with regular times and numbers; None for others.

    Args:
        target: the column to forecast, where a person has named it.
    """
    import pandas as pd

    time = next((str(n) for n in frame.columns if TIMES.match(str(n))), None)
    if time is None or len(frame) < LEAST_ROWS or pd.api.types.is_numeric_dtype(frame[time]):
        return None
    times = pd.to_datetime(frame[time], errors="coerce", utc=True, format="ISO8601")
    times = times.dt.tz_localize(None)
    if times.isna().any():
        return None
    numbers = [str(n) for n in frame.columns if n != time and frame[n].dtype.kind in "iuf"]
    named = [n for t in TARGETS for n in numbers if n.lower() == t]
    if not numbers or (target is not None and target not in numbers):
        return None
    chosen = target or (named or numbers)[0]
    id_ = _id(frame, time, chosen)
    one = times if id_ is None else times[frame[id_] == frame[id_].iloc[0]]
    distinct = np.unique(one.to_numpy().astype("datetime64[s]"))
    if len(distinct) < LEAST_ROWS // 2 or len(distinct) < len(one) / 2:
        return None
    step = clock.guess(distinct)
    beat = clock.Clock(step)
    positions = beat.positions(distinct)
    if (np.diff(positions) == 1).mean() < REGULAR or (positions % 1).any():
        return None
    gaps = int(positions[-1]) + 1 - len(distinct)
    empty = gaps + int(frame[chosen].isna().sum())
    horizon = max(1, min(HORIZONS.get(step, 12), int(positions[-1]) // (2 * LONGEST)))
    history = max(horizon, min(7 * beat.season, int(positions[-1]) // LONGEST - horizon))
    others = [n for n in numbers if n not in (chosen, id_)]
    guesses = [
        Guess("data.kind", "series", f"{time} holds times, a value every {step}"),
        Guess("data.source", source),
        Guess("data.time", time, f"from {distinct[0]} to {distinct[-1]}"),
        Guess("data.target", chosen, "as asked" if target else "by its name" if named else "first"),
    ]
    if id_ is not None:
        guesses.append(Guess("data.id", id_, f"{frame[id_].nunique()} series"))
    guesses += [
        Guess("data.horizon", horizon, "values to forecast"),
        Guess("data.history", history, f"values before them; a season has {beat.season}"),
    ]
    if others:
        said = "known up to now; name those known in advance under known"
        guesses.append(Guess("data.covariates.past", others, said))
    keys = [time] if id_ is None else [id_, time]
    if not (one.is_monotonic_increasing):
        guesses.append(Guess("data.preprocess.unsorted", "sort", "rows are not in order"))
    if repeated := int(frame.duplicated(keys).sum()):
        said = f"{repeated:,} times come more than once"
        guesses.append(Guess("data.preprocess.repeated", "first", said))
    if empty or any(frame[name].isna().any() for name in others):
        guesses.append(Guess("data.preprocess.gaps", "mask", f"{empty:,} times have no value"))
    return guesses


def _id(frame: pd.DataFrame, time: str, target: str) -> str | None:
    """A column that tells rows of the same time apart, where many are."""
    if frame[time].duplicated().mean() < 0.5:
        return None
    for name in frame.columns:
        few = 1 < frame[name].nunique() <= len(frame) // (LEAST_ROWS // 2)
        if name not in (time, target) and few and not frame.duplicated([name, time]).any():
            return str(name)
    return None


def model(dataset: Dataset) -> list[Guess]:
    """The model of either."""
    if isinstance(dataset.preprocess, InteractionFit):
        features = any(c.lookup for c in dataset.schema.columns)
        why = "with what the features add" if features else "a vector of each id"
        return [
            Guess("model.name", "matrix_factorization", why),
            Guess("model.width", 64 if len(dataset.train) > 10_000 else 16, "of the vectors"),
            Guess("model.dropout", 0.4, "keeps ratings from being learnt by heart"),
        ]
    return [
        Guess("model.name", "nbeats", "the history and what is known of the times ahead"),
        Guess("model.width", 128 if len(dataset.train) > 5000 else 32, "units of a layer"),
        Guess("model.dropout", 0.1, "the study looks around it"),
    ]


MEASURES: dict[str, tuple[str, str, Any]] = {
    "regression": ("rmse", "min", "the root of the mean squared error, in stars"),
    "ranking": ("ndcg", "max", "what was taken, high up in the list"),
    "forecast": ("mae", "min", "the mean error, in the target's own unit"),
}
"""Task -> metric of the gate, which way is better, and why."""
