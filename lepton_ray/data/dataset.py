"""From a data section to arrays a model can train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import ImageData, TableData
from lepton_ray.data import preprocess, sources, split
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Schema
from lepton_ray.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Samples:
    x: npt.NDArray[np.float32]
    """[n, *input_shape]"""
    y: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    """[n] Index into the classes, or the target's value."""

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    schema: Schema
    preprocess: Preprocess
    train: Samples
    validation: Samples
    test: Samples
    test_columns: dict[str, npt.NDArray[np.generic]]
    """The test split as a person would send it: column name -> raw values [n, ...]."""
    digest: str
    """SHA-256 over all raw values, labels and the split."""


def load(data: ImageData | TableData) -> Dataset:
    """Read, split, fit the preprocessing on the training split, apply it to all.

    Raises:
        DataError: see `sources.read`, `split.divide` and `preprocess.fit_table`.
    """
    raw = sources.read(data)
    classes, y = _classes(data, raw)
    parts = split.divide(raw.labels, data.split, raw.given_test)
    columns = {
        part: {name: values[indices] for name, values in raw.columns.items()}
        for part, indices in parts.items()
    }
    if isinstance(data, ImageData):
        fitted = preprocess.fit_image(
            raw.kinds[0], columns["train"]["image"], data.preprocess.normalize
        )
    else:
        fitted = preprocess.fit_table(raw.kinds, columns["train"], data.preprocess.missing)
    if not classes:
        fitted = preprocess.fit_target(fitted, y[parts["train"]])
    samples = {
        part: Samples(x=fitted.apply(columns[part]), y=y[indices])
        for part, indices in parts.items()
    }
    return Dataset(
        schema=Schema(columns=fitted.columns, target=raw.target, classes=classes),
        preprocess=fitted,
        test_columns=columns["test"],
        digest=_digest(raw, parts),
        **samples,
    )


def _classes(
    data: ImageData | TableData, raw: sources.Raw
) -> tuple[tuple[str, ...], npt.NDArray[np.int64] | npt.NDArray[np.float64]]:
    """The classes and each sample's index; no classes and the values where labels are numbers."""
    if raw.labels.dtype.kind == "f":
        return (), raw.labels.astype(np.float64)
    classes, y = np.unique(raw.labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"{data.source}: all labels are {classes[0]!r}; there is nothing to learn")
    return tuple(str(c) for c in classes), y.astype(np.int64)


def _digest(raw: sources.Raw, parts: dict[str, split.Indices]) -> str:
    digest = hashlib.sha256()
    arrays = [*raw.columns.items(), ("", raw.labels), *parts.items()]
    for name, values in arrays:
        digest.update(f"{name}|{values.dtype}|{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
