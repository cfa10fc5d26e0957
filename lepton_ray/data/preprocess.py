"""Preprocessing, fitted on the training split only; the same code in training, batch and HTTP.

Saved as ``preprocess.json``, ``preprocess.safetensors`` and, for texts, ``tokenizer.json``: no
pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from lepton_ray.config.schema import TablePreprocess, TextPreprocess
from lepton_ray.data import features, room, spread, words
from lepton_ray.data.features import Feature, signed_log
from lepton_ray.data.hands import Hands
from lepton_ray.data.pretrained import Pixels, Pretrained, Words
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError

FORMAT = 2  # 1 had the numbers of a table in three tensors, see `_features_of_format_1`
TOKENIZER = "tokenizer.json"
PART = 1024  # images that are computed with at a time, so that only they take more room
Floats = npt.NDArray[np.float32]
Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int32]
"""[n, ...] What a model takes: numbers, or the numbers of words."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Fitted numbers by name, and the columns they belong to."""

    columns: tuple[Column, ...]
    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Of images."""
    features: tuple[Feature, ...] = ()
    """Of a table, one for each column."""
    target_mean: float = 0.0
    target_deviation: float = 1.0
    """Of a number to predict: a model learns (value - mean) / deviation."""
    target_log: bool = False
    """Whether the model learns that of the logarithm, see `signed_log`."""
    tokenizer: Tokenizer | None = None
    """Of texts; see `words`."""

    @property
    def facts(self) -> dict[str, Any]:
        """What only the data can tell a model, by the name of its argument."""
        if self.tokenizer is not None:
            return {"vocabulary": self.tokenizer.get_vocab_size()}
        if self.features:
            return {"columns": tuple(b for feature in self.features for b in feature.blocks)}
        return {}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample for the model: (channels, height, width), (features,) or (words,)."""
        first = self.columns[0]
        if first.kind == "image":
            height, width, *channels = first.shape
            return (channels[0] if channels else 1, height, width)
        if self.tokenizer is not None:
            return (words.length(self.tokenizer),)
        return (sum(self.facts["columns"]),)

    def apply(self, columns: Mapping[str, Any]) -> Inputs:
        """[n, *input_shape] from column name -> [n, ...] values.

        Raises:
            DataError: for a number or date that is missing where that is refused.
        """
        if self.columns[0].kind == "image":
            return self._image(np.asarray(columns[self.columns[0].name]))
        if self.tokenizer is not None:
            return words.encode(self.tokenizer, columns[self.columns[0].name])
        n = len(next(iter(columns.values())))
        x = room.zeros((n, *self.input_shape), np.float32)
        at = 0
        for feature in self.features:
            width = sum(feature.blocks)
            feature.encode(columns[feature.name], x[:, at : at + width])
            at += width
        return x

    def scaled_target(self, y: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """What a model learns of the numbers to predict [n]."""
        values = y.astype(np.float64)
        return ((signed_log(values) if self.target_log else values) - self.target_mean) / (
            self.target_deviation
        )

    def target_values(self, outputs: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The inverse: a model's outputs as values in the target's unit."""
        values = outputs.astype(np.float64) * self.target_deviation + self.target_mean
        if self.target_log:
            with np.errstate(over="ignore"):  # infinite, and refused for it
                values = np.sign(values) * np.expm1(np.abs(values))
        return values

    def restore(self, outputs: npt.NDArray[np.floating], x: Inputs) -> npt.NDArray[np.floating]:
        """A number's outputs in the target's unit, see `target_values`."""
        return self.target_values(outputs)

    def _image(self, x: npt.NDArray[np.generic]) -> Floats:
        scaled = np.empty((len(x), *self.input_shape), np.float32)
        for part in _parts(len(x)):
            images = _channels_first(x[part].astype(np.float32))
            scaled[part] = (images - self.tensors["mean"]) * self.tensors["scale"]
        return scaled

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """All but the tokenizer, as JSON and tensors; see `described`."""
        tensors = dict(self.tensors)
        told = []
        for at, feature in enumerate(self.features):
            fields = vars(feature) | {"kind": feature.kind}
            if (knots := fields.pop("knots", None)) is not None:
                tensors[f"{at}.knots"] = knots
            told.append(fields)
        value = {
            "format": FORMAT,
            "columns": [asdict(c) for c in self.columns],
            "features": told,
            "target": {
                "mean": self.target_mean,
                "deviation": self.target_deviation,
                "log": self.target_log,
            },
        }
        return value, tensors

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""
        value, tensors = self.describe()
        (folder / "preprocess.json").write_text(json.dumps(value, indent=1))
        save_file(tensors, folder / "preprocess.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.save(str(folder / TOKENIZER), pretty=False)

    @staticmethod
    def load(folder: Path) -> Preprocess:
        """Read what `save` wrote, in this version or an earlier one."""
        value = json.loads((folder / "preprocess.json").read_text())
        tokenizer = folder / TOKENIZER
        return replace(
            described(value, load_file(folder / "preprocess.safetensors")),
            tokenizer=Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None,
        )


def described(value: dict[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Preprocess:
    """The inverse of `Preprocess.describe`."""
    columns = tuple(map(Column.from_json, value["columns"]))
    if value["format"] == 1:
        found = _features_of_format_1(columns, value["missing"], tensors)
    else:
        found = tuple(
            _feature(fields, tensors.get(f"{at}.knots"))
            for at, fields in enumerate(value["features"])
        )
    return Preprocess(
        columns=columns,
        tensors={} if found else tensors,
        features=found,
        target_mean=value["target"]["mean"],
        target_deviation=value["target"]["deviation"],
        target_log=value["target"].get("log", False),
    )


def _feature(fields: dict[str, Any], knots: npt.NDArray[np.float64] | None) -> Feature:
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name != "kind"
    }
    if knots is not None:
        given["knots"] = knots
    return features.KINDS[fields["kind"]](**given)


def _features_of_format_1(
    columns: tuple[Column, ...], missing: str, tensors: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[Feature, ...]:
    found: list[Feature] = []
    number = 0
    for column in columns:
        if column.kind == "category":
            found.append(features.Category(name=column.name, categories=column.categories))
        elif column.kind == "number":
            median, mean, scale = (float(tensors[t][number]) for t in ("median", "mean", "scale"))
            fill = median if missing == "median" else None
            found.append(features.Number(name=column.name, fill=fill, mean=mean, scale=scale))
            number += 1
    return tuple(found)


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
    return Preprocess(columns=(column,), tensors=_as_float32(tensors))


def adopt_image(column: Column, pixels: Pixels) -> Preprocess:
    """As a pretrained model has it.

    Raises:
        DataError: where the images are of other channels, or not from 0 to 255.
    """
    channels = column.shape[2] if len(column.shape) > 2 else 1
    if channels != len(pixels.mean) or column.high != 255:
        raise DataError(
            f"the model takes images of {len(pixels.mean)} channels of 0 to 255, but these have "
            f"{channels} and end at {column.high or 0:g}: make them files in class folders, which "
            "are read as the model takes them"
        )
    mean, scale = (np.array(v).reshape(-1, 1, 1) for v in (pixels.mean, pixels.deviation))
    tensors = {"mean": mean, "scale": _inverse(scale)}
    return Preprocess(columns=(column,), tensors=_as_float32(tensors))


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
    columns: tuple[Column, ...],
    values: Mapping[str, npt.NDArray[np.generic]],
    settings: TablePreprocess,
    hands: Hands,
) -> Preprocess:
    """See `features.fit`."""
    fitted, found = features.fit(columns, values, settings, hands)
    return Preprocess(columns=fitted, features=found)


def fit_text(
    column: Column,
    texts: npt.NDArray[Any],
    limits: TextPreprocess,
    pretrained: Pretrained | None = None,
) -> Preprocess:
    """A tokenizer of the training texts [n], or a pretrained model's own."""
    given = texts.tolist()
    if pretrained is None:
        tokenizer = words.fit(given, limits.vocabulary, limits.length)
    else:
        own = pretrained.samples
        assert isinstance(own, Words), "read for texts"
        tokenizer = words.adopt(own.tokenizer, own.padding, given, limits.length)
    return Preprocess(columns=(column,), tokenizer=tokenizer)


def fit_target(fitted: Preprocess, y: npt.NDArray[Any], log: bool) -> Preprocess:
    """With mean and deviation of the training targets [n], or of their logarithms."""
    values = signed_log(y.astype(np.float64)) if log else y
    mean, deviation = float(values.mean()), float(spread.deviation(values))
    return replace(fitted, target_mean=mean, target_deviation=deviation or 1.0, target_log=log)


def _inverse(deviation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(deviation > 0, 1.0 / np.where(deviation > 0, deviation, 1.0), 1.0)


def _as_float32(tensors: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
