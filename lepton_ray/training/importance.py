"""What a model goes by, over many samples: how much worse it gets when a part tells nothing.

Columns and patches of pixels are shuffled over the samples (Breiman, "Random Forests", 2001); words
are made unknown ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_ray.data import words
from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.preprocess import Inputs, Preprocess
from lepton_ray.training.tasks import task_of

ROWS = {"table": 2048, "image": 256, "text": 1024}  # of the validation split, at most
REPEATS = 3  # shuffles of a column
PATCHES = 8  # along each side of an image
WORDS = 100  # the most frequent ones
CHUNK = 256


def measure(model: nn.Module, dataset: Dataset, fitted: Preprocess) -> dict[str, Any]:
    """How much the loss rises on the validation split without each part, the most important first.

    Args:
        fitted: the data set's own.

    Returns:
        ``split``, ``samples``, ``loss`` (with all parts) and ``parts``: each with ``name`` and
        ``loss_increase``. Of an image a part is a patch, named by its pixels.
    """
    first = dataset.schema.columns[0].kind
    kind = first if first in ("image", "text") else "table"
    x, y = dataset.validation.x[: ROWS[kind]], dataset.validation.y[: ROWS[kind]]
    was_training = model.training
    model.eval()
    try:
        whole = _loss(model, dataset, x, y)
        rises = {
            name: _increase(model, dataset, x, y, changed, whole)
            for name, changed in _changes(kind, fitted, x)
        }
    finally:
        model.train(was_training)
    ranked = sorted(rises.items(), key=lambda item: -item[1])
    parts = [{"name": name, "loss_increase": rise} for name, rise in ranked]
    return {"split": "validation", "samples": len(y), "loss": whole, "parts": parts}


Changed = list[tuple[npt.NDArray[np.intp], Inputs]]
"""Rows, and what they become; once for each repeat."""


def _changes(kind: str, fitted: Preprocess, x: Inputs) -> Iterator[tuple[str, Changed]]:
    rng = np.random.default_rng(0)
    everywhere = np.arange(len(x))
    if kind == "text":
        yield from _without_words(fitted, x)
        return
    if kind == "image":
        _, height, width = x.shape[1:]
        step = [math.ceil(size / PATCHES) for size in (height, width)]
        for top in range(0, height, step[0]):
            for left in range(0, width, step[1]):
                bottom, right = min(height, top + step[0]), min(width, left + step[1])
                patch = (slice(None), slice(None), slice(top, bottom), slice(left, right))
                name = f"rows {top}-{bottom - 1}, columns {left}-{right - 1}"
                yield name, [(everywhere, _shuffled(x, patch, rng))]
        return
    start = 0
    for feature in fitted.features:
        end = start + sum(feature.blocks)
        at = (slice(None), slice(start, end))
        yield feature.name, [(everywhere, _shuffled(x, at, rng)) for _ in range(REPEATS)]
        start = end


def _shuffled(x: Inputs, at: tuple[slice, ...], rng: np.random.Generator) -> Inputs:
    changed = x.copy()
    changed[at] = x[at][rng.permutation(len(x))]
    return changed


def _without_words(fitted: Preprocess, x: Inputs) -> Iterator[tuple[str, Changed]]:
    tokenizer = fitted.tokenizer
    assert tokenizer is not None
    unknown = words.unknown(tokenizer) or 0  # which a model passes over, as it does a text's end
    passed = [unknown, *words.marks(tokenizer)]
    counts = np.bincount(x.reshape(-1).astype(np.int64), minlength=max(passed) + 1)
    counts[passed] = 0
    order = np.argsort(-counts, kind="stable")[:WORDS]
    for number in order[counts[order] > 0].tolist():
        rows = np.flatnonzero((x == number).any(axis=1))
        without = np.where(x[rows] == number, np.int32(unknown), x[rows])
        yield words.word(tokenizer, number), [(rows, without)]


def _increase(
    model: nn.Module,
    dataset: Dataset,
    x: Inputs,
    y: npt.NDArray[Any],
    changed: Changed,
    whole: float,
) -> float:
    """Mean over the repeats; rows that stay as they are have no part in it but count."""
    rises = []
    for rows, becomes in changed:
        before = whole if len(rows) == len(y) else _loss(model, dataset, x[rows], y[rows])
        after = _loss(model, dataset, becomes, y[rows])
        rises.append((after - before) * len(rows) / len(y))
    return float(np.mean(rises))


@torch.no_grad()
def _loss(model: nn.Module, dataset: Dataset, x: Inputs, y: npt.NDArray[Any]) -> float:
    task, samples = task_of(dataset), Samples(x=x, y=y)
    outputs = [
        model(torch.from_numpy(np.ascontiguousarray(x[at : at + CHUNK])))
        for at in range(0, len(x), CHUNK)
    ]
    return task.measure(task.answers(torch.cat(outputs), samples), samples)["loss"]
