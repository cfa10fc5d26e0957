"""What a version carries for people: what it goes by, what to compare with, and some examples."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.numpy import save
from torch import nn

from lepton_ray.data.dataset import Dataset
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Column
from lepton_ray.data.split import rarest
from lepton_ray.serving.explain import BASELINE
from lepton_ray.serving.runtime import EXAMPLES
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.training import importance as importances

IMPORTANCE = "importance.json"


def files(model: nn.Module, dataset: Dataset, *, examples: int) -> dict[str, bytes]:
    """Name -> content of the files beside a trained model.

    Args:
        examples: test samples to take along.
    """
    fitted = dataset.preprocess
    if not isinstance(fitted, Preprocess):  # interactions and series: no parts to take away
        return {}
    found = importances.measure(model, dataset, fitted)
    made = {IMPORTANCE: json.dumps(found, indent=1).encode()}
    if fitted.features:
        mean = dataset.train.x.mean(axis=0, dtype=np.float64).astype(np.float32)
        made[BASELINE] = save({"mean": mean})
    if examples:
        made[EXAMPLES] = json.dumps(_examples(dataset, examples)).encode()
    return made


def importance(version: ModelVersion) -> Any:
    """What `files` measured of a registered version; None of one that has it not."""
    path = version.folder() / IMPORTANCE
    return json.loads(path.read_text()) if path.exists() else None


def _examples(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Test samples in turn from each class (or rarest label), as a request's ``row``, and the true
    ``answer``: a class, a list of labels or a number."""
    y, classes = dataset.test.y, dataset.schema.classes
    several = dataset.schema.task == "multilabel"
    order = np.arange(len(y))
    if classes:
        kinds = rarest(y == 1) if several else y
        turn = np.zeros(len(y), np.int64)
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            turn[members] = np.arange(len(members))
        order = np.lexsort((kinds, turn))

    def answer(at: int) -> Any:
        if several:
            return [name for name, has in zip(classes, y[at], strict=True) if has]
        return classes[int(y[at])] if classes else float(y[at])

    chosen = order[:count]
    return [
        {
            "row": {
                c.name: _value(c, dataset.test_columns[c.name][at]) for c in dataset.schema.columns
            },
            "answer": answer(at),
        }
        for at in chosen.tolist()
    ]


def _value(column: Column, value: Any) -> Any:
    if column.kind == "image":
        return _png(column, np.asarray(value, np.float32))
    if column.kind == "number":
        number = float(value)
        return number if np.isfinite(number) else None
    return str(value)


def _png(column: Column, pixels: npt.NDArray[np.float32]) -> str:
    """Base64 of a file that the endpoint takes: a page shows it, and sends it as it is."""
    low, high = column.low or 0.0, 255.0 if column.high is None else column.high
    scaled = ((pixels - low) * (255.0 / (high - low))).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(scaled[..., 0] if scaled.shape[2:] == (1,) else scaled).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
