"""Preprocessing, fitted on the training split only; the same code in training, batch and HTTP.

Saved as ``preprocess.json``, ``preprocess.safetensors`` and, for texts, ``tokenizer.json``: no
pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from lepton_ray.config.schema import TextPreprocess
from lepton_ray.data import words
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError

FORMAT = 1
TOKENIZER = "tokenizer.json"
PART = 1024  # images that are computed with at a time, so that only they take more room
Floats = npt.NDArray[np.float32]
Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int32]
"""[n, ...] What a model takes: numbers, or the numbers of words."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Fitted numbers by name, and the columns they belong to."""

    columns: tuple[Column, ...]
    missing: str
    tensors: Mapping[str, npt.NDArray[np.float32]]
    target_mean: float = 0.0
    target_deviation: float = 1.0
    """Of a number to predict: a model learns (value - mean) / deviation."""
    tokenizer: Tokenizer | None = None
    """Of texts; see `words`."""

    @property
    def vocabulary(self) -> int | None:
        """How many words there are, for a model of texts: their numbers lie below it."""
        return self.tokenizer.get_vocab_size() if self.tokenizer else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample for the model: (channels, height, width), (features,) or (words,)."""
        first = self.columns[0]
        if first.kind == "image":
            height, width, *channels = first.shape
            return (channels[0] if channels else 1, height, width)
        if self.tokenizer is not None:
            return (words.length(self.tokenizer),)
        return (sum(len(c.categories) if c.kind == "category" else 1 for c in self.columns),)

    def apply(self, columns: Mapping[str, Any]) -> Inputs:
        """[n, *input_shape] from column name -> [n, ...] values.

        Raises:
            DataError: for a number that is missing when ``missing`` is ``refuse``.
        """
        if self.columns[0].kind == "image":
            return self._image(np.asarray(columns[self.columns[0].name]))
        if self.tokenizer is not None:
            return words.encode(self.tokenizer, columns[self.columns[0].name])
        return self._table(columns)

    def _image(self, x: npt.NDArray[np.generic]) -> Floats:
        scaled = np.empty((len(x), *self.input_shape), np.float32)
        for part in _parts(len(x)):
            images = _channels_first(x[part].astype(np.float32))
            scaled[part] = (images - self.tensors["mean"]) * self.tensors["scale"]
        return scaled

    def _table(self, columns: Mapping[str, Any]) -> Floats:
        n = len(next(iter(columns.values())))
        features = np.zeros((n, *self.input_shape), np.float32)
        at = number = 0
        for column in self.columns:
            if column.kind == "number":
                values = np.asarray(columns[column.name], np.float64)
                absent = ~np.isfinite(values)
                if absent.any():
                    if self.missing == "refuse":
                        raise DataError(_missing_message(column.name, int(absent.sum()), n))
                    values = np.where(absent, self.tensors["median"][number], values)
                mean, scale = self.tensors["mean"][number], self.tensors["scale"][number]
                # Too large for float32 becomes infinite, and the answer is refused for it.
                with np.errstate(over="ignore"):
                    features[:, at] = (values - mean) * scale
                at, number = at + 1, number + 1
            else:
                known = np.asarray(column.categories, np.str_)
                texts = np.asarray(columns[column.name]).astype(np.str_)
                position = np.searchsorted(known, texts)
                position[position == len(known)] = 0
                rows = np.flatnonzero(known[position] == texts)  # an unseen value stays all zero
                features[rows, at + position[rows]] = 1.0
                at += len(known)
        return features

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""
        value = {
            "format": FORMAT,
            "missing": self.missing,
            "columns": [asdict(c) for c in self.columns],
            "target": {"mean": self.target_mean, "deviation": self.target_deviation},
        }
        (folder / "preprocess.json").write_text(json.dumps(value, indent=1))
        save_file(dict(self.tensors), folder / "preprocess.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.save(str(folder / TOKENIZER), pretty=False)

    @staticmethod
    def load(folder: Path) -> Preprocess:
        """Read what `save` wrote."""
        value = json.loads((folder / "preprocess.json").read_text())
        tokenizer = folder / TOKENIZER
        return Preprocess(
            columns=tuple(map(Column.from_json, value["columns"])),
            missing=value["missing"],
            tensors=load_file(folder / "preprocess.safetensors"),
            target_mean=value["target"]["mean"],
            target_deviation=value["target"]["deviation"],
            tokenizer=Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None,
        )


def fit_image(column: Column, x: npt.NDArray[np.generic], normalize: bool) -> Preprocess:
    """Mean and deviation per channel of the training images [n, h, w] or [n, h, w, c]."""
    images = _channels_first(x)
    channels = images.shape[1]
    if normalize:
        mean = images.mean(axis=(0, 2, 3), dtype=np.float64)
        deviation = _deviation(images, mean)
    else:
        mean, deviation = np.zeros(channels), np.full(channels, column.high or 1.0)
    tensors = {"mean": mean.reshape(-1, 1, 1), "scale": _inverse(deviation).reshape(-1, 1, 1)}
    return Preprocess(columns=(column,), missing="refuse", tensors=_as_float32(tensors))


def _deviation(images: npt.NDArray[Any], mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[channels] Of images [n, channels, h, w]; a part at a time, since float64 takes eight times
    the room of bytes."""
    squares = sum(
        np.square(images[part] - mean[:, None, None]).sum(axis=(0, 2, 3))
        for part in _parts(len(images))
    )
    deviation: npt.NDArray[np.float64] = np.sqrt(squares / (images.size // images.shape[1]))
    return deviation


def _channels_first(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[n, channels, h, w] from [n, h, w] or [n, h, w, channels]."""
    return x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)


def _parts(n: int) -> Iterator[slice]:
    return (slice(at, at + PART) for at in range(0, n, PART))


def fit_table(
    columns: tuple[Column, ...], values: Mapping[str, npt.NDArray[np.generic]], missing: str
) -> Preprocess:
    """Categories of text columns; median, mean and deviation of numbers, from training rows.

    Raises:
        DataError: for missing numbers when ``missing`` is ``refuse``, or a column without any.
    """
    fitted, median, mean, deviation = [], [], [], []
    for column in columns:
        given = values[column.name]
        if column.kind == "category":
            known = tuple(str(v) for v in np.unique(given))
            fitted.append(Column(name=column.name, kind="category", categories=known))
            continue
        numbers = given.astype(np.float64)
        present = numbers[np.isfinite(numbers)]
        if len(present) == 0:
            raise DataError(f"column {column.name!r} has no numbers: data.drop: [{column.name}]")
        if len(present) < len(numbers) and missing == "refuse":
            raise DataError(
                _missing_message(column.name, len(numbers) - len(present), len(numbers))
            )
        low, high = float(present.min()), float(present.max())
        fitted.append(Column(name=column.name, kind="number", low=low, high=high))
        median.append(np.median(present))
        filled = np.where(np.isfinite(numbers), numbers, median[-1])
        mean.append(filled.mean())
        deviation.append(filled.std())
    tensors = {
        "median": np.array(median),
        "mean": np.array(mean),
        "scale": _inverse(np.array(deviation)),
    }
    return Preprocess(columns=tuple(fitted), missing=missing, tensors=_as_float32(tensors))


def fit_text(column: Column, texts: npt.NDArray[Any], limits: TextPreprocess) -> Preprocess:
    """A tokenizer of the training texts [n]."""
    tokenizer = words.fit(texts.tolist(), limits.vocabulary, limits.length)
    return Preprocess(columns=(column,), missing="refuse", tensors={}, tokenizer=tokenizer)


def fit_target(fitted: Preprocess, y: npt.NDArray[np.generic]) -> Preprocess:
    """With mean and deviation of the training targets [n]."""
    mean, deviation = float(y.mean()), float(y.std())
    return replace(fitted, target_mean=mean, target_deviation=deviation or 1.0)


def _inverse(deviation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(deviation > 0, 1.0 / np.where(deviation > 0, deviation, 1.0), 1.0)


def _as_float32(tensors: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}


def _missing_message(name: str, absent: int, total: int) -> str:
    return (
        f"column {name!r} has no finite number in {absent} of {total} rows: fill or drop them, or "
        "set data.preprocess.missing: median"
    )
