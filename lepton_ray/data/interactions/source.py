"""A file of interactions: read, checked, and divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import InteractionData
from lepton_ray.data import frames
from lepton_ray.data.hands import Hands
from lepton_ray.data.order import generator
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

Indices = npt.NDArray[np.int64]
MAX_IDS = 1 << 24  # whole numbers that float32 holds, in which an id travels
MAX_CATEGORIES = 1000


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """All of a source, before any split."""

    user: npt.NDArray[np.object_]
    """[n] Ids as texts."""
    item: npt.NDArray[np.object_]
    rating: npt.NDArray[np.float64]
    """[n] Ones where the source has none."""
    time: npt.NDArray[np.float64] | None
    features: dict[str, npt.NDArray[Any]]
    """Column name -> [n] numbers or texts."""
    kinds: tuple[Column, ...]
    """The columns of features: the users', then the items'."""
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Indices) -> Interactions:
        """Some of them."""
        return Interactions(
            user=self.user[rows],
            item=self.item[rows],
            rating=self.rating[rows],
            time=None if self.time is None else self.time[rows],
            features={name: values[rows] for name, values in self.features.items()},
            kinds=self.kinds,
            notes=self.notes,
        )


def read(data: InteractionData, hands: Hands | None = None) -> Interactions:
    """The interactions of a source.

    Raises:
        DataError: for missing columns, ids, ratings and times.
    """
    frame = frames.read(data.source, [data.user, data.item], hands=hands)
    if len(frame) == 0:
        raise DataError(f"data.source {data.source!r} holds no interactions")
    named = [data.user, data.item, data.rating, data.time]
    for name in [*named, *data.features.user, *data.features.item]:
        if name is not None and name not in frame.columns:
            raise DataError(
                f"{data.source}: no column {name!r}, {nearest(name, map(str, frame.columns))}"
            )
    notes = []
    if data.task == "ranking":
        n = len(frame)
        if data.time is not None:  # the latest counts, in whichever order they are written
            when = _times(data, frame[data.time])
            frame = frame.iloc[np.argsort(when, kind="stable")]
        frame = frame.drop_duplicates([data.user, data.item], keep="last")
        frame = frame.sort_index().reset_index(drop=True)
        if len(frame) < n:
            notes.append(f"{n - len(frame):,} of {n:,} interactions are repeated and count once")
    elif repeated := int(frame.duplicated([data.user, data.item]).sum()):
        notes.append(f"{repeated:,} of {len(frame):,} rows rate again what the user has rated")
    features, kinds = {}, []
    for name in (*data.features.user, *data.features.item):
        features[name], kind = _feature(data, frame[name])
        kinds.append(Column(name=name, kind=kind))
    return Interactions(
        user=_ids(data, frame[data.user]),
        item=_ids(data, frame[data.item]),
        rating=_ratings(data, frame),
        time=None if data.time is None else _times(data, frame[data.time]),
        features=features,
        kinds=tuple(kinds),
        notes=tuple(notes),
    )


def id_text(value: Any) -> str:
    """An id as its text; a whole number without a fraction, however it was stored."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def shown(value: Any) -> str:
    """A cell as a message tells it."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def _ids(data: InteractionData, values: pd.Series) -> npt.NDArray[np.object_]:
    ids = np.array([*map(id_text, values), None], object)[:-1]
    missing = np.flatnonzero(ids == "")
    if len(missing):
        raise DataError(
            f"{data.source}: {len(missing)} of {len(ids)} rows have no {values.name!r}, the first "
            f"is row {missing[0]}: fill or drop them"
        )
    if len(set(ids)) >= MAX_IDS:
        raise DataError(
            f"{data.source}: {values.name!r} has {len(set(ids)):,} distinct ids, and at most "
            f"{MAX_IDS - 1:,} can be told apart: take a part of them"
        )
    return ids


def _ratings(data: InteractionData, frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    import pandas as pd

    if data.rating is None:
        return np.ones(len(frame))
    given = frame[data.rating]
    numbers: npt.NDArray[np.float64] = pd.to_numeric(given, errors="coerce").to_numpy(
        dtype=np.float64, na_value=np.nan
    )
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise DataError(
            f"{data.source}: {len(bad)} of {len(numbers)} ratings in {data.rating!r} are not "
            f"numbers, the first is {shown(given.iloc[bad[0]])} in row {bad[0]}: repair or drop "
            "them"
        )
    if data.task == "rating" and numbers.min() == numbers.max():
        raise DataError(
            f"{data.source}: every {data.rating!r} is {numbers[0]:g}; there is nothing to learn: "
            "set data.task: ranking to learn what is taken"
        )
    return numbers


def _times(data: InteractionData, values: pd.Series) -> npt.NDArray[np.float64]:
    """[n] Numbers as they are, dates in seconds."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        dates = pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601")
        bad = np.flatnonzero(dates.isna())
        if len(bad):
            raise DataError(
                f"{data.source}: {len(bad)} of {len(values)} times in {data.time!r} are neither "
                f"numbers nor dates, the first is {shown(values.iloc[bad[0]])} in row {bad[0]}: "
                "write dates as 2024-01-31 or 2024-01-31T13:00, or drop them"
            )
        numbers = (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    found: npt.NDArray[np.float64] = numbers.to_numpy(dtype=np.float64)
    return found


def _feature(data: InteractionData, values: pd.Series) -> tuple[npt.NDArray[Any], Any]:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values.to_numpy(dtype=np.float64, na_value=np.nan), "number"
    if values.nunique() > MAX_CATEGORIES:
        raise DataError(
            f"{data.source}: the feature {values.name!r} has {values.nunique()} distinct texts, "
            f"and a category has at most {MAX_CATEGORIES}: leave it out of data.features"
        )
    return values.fillna("").astype(str).to_numpy(dtype=np.str_), "category"


def divide(data: InteractionData, all_: Interactions) -> dict[str, Indices]:
    """Sorted indices of ``train``, ``validation`` and ``test``.

    Raises:
        DataError: when a part is empty.
    """
    n, split, by = len(all_), data.split, data.split_by
    if by == "last":
        assert all_.time is not None
        order = np.lexsort((np.arange(n), all_.time))
        place = np.empty(n, np.int64)
        place[order] = np.arange(n)
        _, users = np.unique(all_.user.astype(np.str_), return_inverse=True)
        ranked = np.lexsort((place, users))
        ends = np.cumsum(np.bincount(users))
        counts = np.bincount(users)
        enough = counts >= 3
        test, validation = ranked[ends[enough] - 1], ranked[ends[enough] - 2]
    else:
        if by == "time":
            assert all_.time is not None
            order = np.lexsort((np.arange(n), all_.time))
        else:
            order = generator(split.seed, "test").permutation(n)
        rest, test = np.split(order, [n - round(split.test * n)])
        if by == "random":
            rest = generator(split.seed, "validation").permutation(rest)
        rest, validation = np.split(rest, [len(rest) - round(split.validation * len(rest))])
    held = np.concatenate([test, validation])
    parts = {
        "train": np.setdiff1d(np.arange(n), held),
        "validation": np.sort(validation),
        "test": np.sort(test),
    }
    for name, rows in parts.items():
        if len(rows) == 0:
            way_out = (
                "a user needs three interactions: add some, or set split.by: random"
                if by == "last"
                else "raise the share or add interactions"
            )
            raise DataError(f"the {name} split is empty: {n} interactions; {way_out}")
    return parts
