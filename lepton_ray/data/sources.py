"""Read what ``data.source`` names into columns of raw values and a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lepton_ray.config.schema import ImageData, TableData, TextData
from lepton_ray.data import (
    dates,
    folders,
    frames,
    image_arrays,
    labels,
    room,
    slices,
    tables,
    words,
)
from lepton_ray.data.hands import Hands
from lepton_ray.data.pretrained import Pixels
from lepton_ray.data.schema import Column
from lepton_ray.data.slices import Groups
from lepton_ray.data.split import Labels
from lepton_ray.data.tables import MAX_CATEGORIES
from lepton_ray.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Raw:
    """All samples as the source holds them, before any split."""

    columns: dict[str, Array]
    """Column name -> values, [n, ...]; images uint8 or float32, numbers of any width, categories
    and dates str, texts objects (an array of str would give each the room of the longest)."""
    kinds: tuple[Column, ...]
    """The columns' types; ranges and categories of tables are filled in from the training split."""
    labels: Labels
    """[n] Texts to classify into, or numbers; or [n, names] whether a sample has a label."""
    names: tuple[str, ...] = ()
    """Of the labels, where a sample may have several."""
    target: str
    given_test: npt.NDArray[np.bool_] | None = None
    """[n] True where the source itself says test."""
    groups: Array | None = None
    """[n] What ``split.group`` names."""
    times: npt.NDArray[np.float64] | None = None
    """[n] What ``split.time`` names."""
    slices: Groups = field(default_factory=dict)
    """See `slices`."""
    notes: tuple[str, ...] = ()
    """What a person should know about the source."""

    def __len__(self) -> int:
        return len(self.labels)


def read(
    data: ImageData | TableData | TextData,
    sliced: Sequence[str] = (),
    pixels: Pixels | None = None,
    hands: Hands | None = None,
) -> Raw:
    """The samples of a data section.

    Args:
        sliced: columns to group the samples by, see `slices`.
        pixels: of a pretrained model, whose colours and, unless another is set, size pictures get.
        hands: for large files, see `frames.read`.

    Raises:
        DataError: when the source is missing, of another format, or holds no samples.
    """
    if isinstance(data, ImageData):
        raw = _read_images(data, pixels)
    elif isinstance(data, TableData):
        raw = _read_table(data, sliced, hands)
    else:
        raw = _read_texts(data, sliced, hands)
    if len(raw) == 0:
        raise DataError(f"data.source {data.source!r} holds no samples")
    pa.default_memory_pool().release_unused()  # of each column's texts
    return raw


def _read_images(data: ImageData, pixels: Pixels | None) -> Raw:
    path = Path(data.source)
    if path.is_dir() and not any(path.glob("*-ubyte*")):
        if pixels is not None:
            taken = {"size": data.preprocess.size or pixels.size, "color": pixels.color}
            asked = data.preprocess.model_copy(update=taken)
            data = data.model_copy(update={"preprocess": asked})
        return _read_folder(data)
    for name in ("size", "color"):
        if getattr(data.preprocess, name) is not None:
            raise DataError(
                f"data.preprocess.{name} is for folders of pictures, but {data.source!r} is none: "
                "leave it out"
            )
    if data.source.startswith("sklearn:"):
        arrays, ends = image_arrays.sklearn_images(data.source.removeprefix("sklearn:"))
    else:
        if not path.exists():
            raise DataError(
                f"data.source {data.source!r} does not exist (looked in {Path.cwd()}); "
                "for Fashion-MNIST run: python experiments/fetch.py fashion-mnist"
            )
        arrays = image_arrays.idx_folder(path) if path.is_dir() else image_arrays.npz(path)
        ends = None
    train, test = (arrays.get("x_train"), arrays.get("x_test"))
    if train is not None:
        x = np.concatenate([train, test]) if test is not None else train
        parts = [arrays["y_train"], arrays["y_test"]] if test is not None else [arrays["y_train"]]
        y = np.concatenate(parts)
        is_test = np.arange(len(x)) >= len(train) if test is not None else None
    else:
        x, y, is_test = arrays["x"], arrays["y"], None
    if len(x) != len(y):
        raise DataError(f"{data.source}: {len(x)} images but {len(y)} labels")
    if x.ndim not in (3, 4):
        raise DataError(
            f"{data.source}: images must be [n, height, width] or [n, height, width, channels], "
            f"but x has shape {x.shape}"
        )
    if x.dtype != np.uint8 and len(x):
        x = x.astype(np.float32)
        bad = int((~np.isfinite(x.reshape(len(x), -1)).all(axis=1)).sum())
        if bad:
            raise DataError(
                f"{data.source}: {bad} of {len(x)} images hold NaN or infinity: drop or repair them"
            )
    low, high = ends or image_arrays.ends_of(x)
    column = Column(name="image", kind="image", shape=x.shape[1:], low=low, high=high)
    names, found = image_arrays.labels_of(data.source, y, arrays.get("labels"))
    return Raw(
        columns={"image": x},
        kinds=(column,),
        labels=found,
        names=names,
        target="label",
        given_test=is_test,
    )


def _read_folder(data: ImageData) -> Raw:
    found = folders.read(data)
    shape = found.pixels.shape[1:]
    return Raw(
        columns={"image": found.pixels},
        kinds=(Column(name="image", kind="image", shape=shape, resized=True, low=0.0, high=255.0),),
        labels=found.labels,
        target="label",
        given_test=found.given_test,
        notes=found.notes,
    )


def _targets(data: TableData | TextData, values: pd.Series) -> Labels:
    """[n] Numbers for a regression, else texts.

    Raises:
        DataError: when the column does not fit the task.
    """
    import pandas as pd

    if isinstance(data, TextData):
        return _classes(data, values, "name a column of classes in data.target")
    if data.task == "regression":
        numbers: npt.NDArray[np.float64] = pd.to_numeric(values, errors="coerce").to_numpy(
            dtype=np.float64
        )
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise DataError(
                f"{data.source}: {len(bad)} of {len(values)} values of target {data.target!r} are "
                f"not numbers, the first is {values.iloc[bad[0]]!r}: repair them, or set "
                "data.task: classification"
            )
        if numbers.min() == numbers.max():
            raise DataError(
                f"{data.source}: every {data.target!r} is {numbers[0]:g}; there is nothing to learn"
            )
        return numbers
    return _classes(data, values, "set data.task: regression")


def _classes(data: TableData | TextData, values: pd.Series, way_out: str) -> npt.NDArray[np.str_]:
    at, known = tables.distinct(values.astype("str"))
    if len(known) > MAX_CATEGORIES:
        raise DataError(
            f"{data.source}: target {data.target!r} has {len(known)} distinct values, and a "
            f"classification has at most {MAX_CATEGORIES} classes: {way_out}"
        )
    return room.take(known.astype(np.str_), at)


def _classes_or_labels(
    data: TableData | TextData, frame: pd.DataFrame
) -> tuple[tuple[str, ...], Labels]:
    """The names of labels and which ones each row has; no names and what `_targets` finds where a
    row has one class or number."""
    found = labels.read(data, frame)
    if found is not None:
        return found
    (target,) = data.targets
    unlabelled = int(frame[target].isna().sum())
    if unlabelled:
        raise DataError(f"{data.source}: {unlabelled} of {len(frame)} rows have no {target!r}")
    return (), _targets(data, frame[target])


def _check_columns(data: TableData | TextData, frame: pd.DataFrame, names: list[str]) -> None:
    for name in names:
        if name not in frame.columns:
            close = nearest(name, map(str, frame.columns))
            raise DataError(f"{data.source}: no column {name!r}, {close}")


def _given_test(data: TableData | TextData, frame: pd.DataFrame) -> npt.NDArray[np.bool_] | None:
    """[n] Where the split's column says test."""
    column = data.split.column
    if column is None:
        return None
    if column not in frame.columns:
        raise DataError(
            f"{data.source}: no column {column!r} to split by (data.split.column), "
            f"{nearest(column, map(str, frame.columns))}"
        )
    other = sorted({str(v) for v in frame[column].unique()} - {"train", "test"})
    if other:
        raise DataError(
            f"{data.source}: the column to split by, {column!r}, must say train or test in every "
            f"row, but it says {other[0]!r}"
        )
    is_test: npt.NDArray[np.bool_] = (frame[column] == "test").to_numpy(dtype=np.bool_)
    return is_test


def _groups(data: TableData | TextData, frame: pd.DataFrame) -> Array | None:
    """[n] The group of every row, where there are any."""
    name = data.split.group
    if name is None:
        return None
    _check_split(data, frame, name, "group")
    return tables.as_texts(frame[name]).astype(np.str_)


def _times(data: TableData | TextData, frame: pd.DataFrame) -> npt.NDArray[np.float64] | None:
    """[n] The time of every row, in seconds if they are dates, where the split is by time."""
    name = data.split.time
    if name is None:
        return None
    _check_split(data, frame, name, "time")
    form = (data.types if isinstance(data, TableData) else {}).get(name, "").partition(" ")[2]
    if not form and tables.guess(frame[name]) == "number":
        found: npt.NDArray[np.float64] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        found = dates.seconds(tables.as_texts(frame[name]), form)
    wrong = np.flatnonzero(np.isnan(found))
    if len(wrong):
        raise DataError(
            f"{data.source}: the column to split by time, {name!r}, must hold dates such as "
            f"2024-01-31 or numbers, but row {wrong[0]} has {frame[name].iloc[wrong[0]]!r:.80}: "
            f"name their form in data.types: {{{name}: date %d.%m.%Y}}, or repair it"
        )
    if found.min() == found.max():
        raise DataError(
            f"{data.source}: every row has the same time {frame[name].iloc[0]!r:.80} in {name!r}, "
            "so none is later than another: name another column in data.split.time"
        )
    return found


def _check_split(data: TableData | TextData, frame: pd.DataFrame, name: str, setting: str) -> None:
    if name not in frame.columns:
        raise DataError(
            f"{data.source}: no column {name!r} to split by (data.split.{setting}), "
            f"{nearest(name, map(str, frame.columns))}"
        )
    empty = int(frame[name].isna().sum())
    if empty:
        raise DataError(
            f"{data.source}: {empty} of {len(frame)} rows have no {name!r}, by which they are to "
            f"be split (data.split.{setting}): fill it, or drop them"
        )


def _frame(
    data: TableData | TextData, texts: Sequence[str], as_written: Sequence[str], hands: Hands | None
) -> pd.DataFrame:
    """See `frames.read`; with a row at least.

    Raises:
        DataError: when it has none.
    """
    codes = {*data.targets, *([data.split.group] if data.split.group else [])}
    frame = frames.read(data.source, texts, as_written, codes, hands)
    if not len(frame):
        raise DataError(f"data.source {data.source!r} holds no samples")
    return frame


def _read_table(data: TableData, sliced: Sequence[str], hands: Hands | None) -> Raw:
    written = [name for name, kind in data.types.items() if kind != "number"]
    frame = _frame(data, _separated(data), written, hands)
    _check_columns(data, frame, [*data.targets, *data.drop])
    values, kinds = tables.columns(data, frame)
    names, found = _classes_or_labels(data, frame)
    return Raw(
        columns=values,
        kinds=kinds,
        labels=found,
        names=names,
        target=_target_name(data),
        given_test=_given_test(data, frame),
        groups=_groups(data, frame),
        times=_times(data, frame),
        slices=slices.read(data.source, frame, sliced),
    )


def _separated(data: TableData | TextData) -> list[str]:
    """The column whose cells are read as they are written: ``NA`` may be a label."""
    return [] if data.separator is None else list(data.targets)


def _target_name(data: TableData | TextData) -> str:
    return data.target if isinstance(data.target, str) else "labels"


def _read_texts(data: TextData, sliced: Sequence[str], hands: Hands | None) -> Raw:
    frame = _frame(data, [data.text, *_separated(data)], [], hands)
    _check_columns(data, frame, [data.text, *data.targets])
    texts = frame[data.text].to_numpy(dtype=object)
    longest = data.preprocess.characters
    for row, text in enumerate(texts):
        if rule := words.problem(text, longest):
            way_out = (
                "name a column of texts in data.text"
                if not isinstance(text, str)
                else "shorten it, or raise data.preprocess.characters"
            )
            raise DataError(
                f"{data.source}: row {row} of column {data.text!r} {rule}, but is "
                f"{text!r:.80}: {way_out}"
            )
    if len(texts) and not any(map(str.strip, texts)):
        raise DataError(
            f"{data.source}: all {len(texts)} texts in column {data.text!r} are empty: name "
            "another column in data.text"
        )
    if len(texts) and all(map(_is_number, texts)):
        raise DataError(
            f"{data.source}: column {data.text!r} holds numbers and no texts, such as "
            f"{texts[0]!r}: name a column of texts in data.text, or set data.kind: table"
        )
    names, found = _classes_or_labels(data, frame)
    return Raw(
        columns={data.text: texts},
        kinds=(Column(name=data.text, kind="text", longest=longest),),
        labels=found,
        names=names,
        target=_target_name(data),
        given_test=_given_test(data, frame),
        groups=_groups(data, frame),
        times=_times(data, frame),
        slices=slices.read(data.source, frame, sliced),
    )


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True
