"""Metrics of answers, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

DIRECTIONS = {
    "loss": "min",
    "accuracy": "max",
    "subset_accuracy": "max",
    "f1_micro": "max",
    "f1_macro": "max",
    "auc": "max",
    "average_precision": "max",
    "mae": "min",
    "rmse": "min",
    "r2": "max",
    "smape": "min",
    "mase": "min",
    "recall": "max",
    "ndcg": "max",
}
"""Every metric of a split, and whether less or more of it is better."""

AHEAD = re.compile(r"_h[0-9]+$")  # behind a metric of one step ahead
Name = TypeVar("Name", bound=Hashable)
SMALLEST = 1e-7  # a class given probability 0 would make the loss infinite


def direction(name: str) -> str:
    """``max`` where more of a metric is better, ``min`` where less is; also of ``mae_h3``, the
    error three steps ahead."""
    return DIRECTIONS[AHEAD.sub("", name)]


def classification(
    probabilities: npt.NDArray[np.floating],
    y: npt.NDArray[Any],
    predicted: npt.NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """``loss`` (mean cross-entropy, nats), ``accuracy``, ``f1_macro``.

    With two classes also ``auc`` and ``average_precision`` of the second.

    Args:
        probabilities: [n, classes]
        y: [n] index of the true class
        predicted: [n] index of the answer; default the likeliest
    """
    if predicted is None:
        predicted = probabilities.argmax(1)
    of_true = probabilities[np.arange(len(y)), y].clip(SMALLEST, 1.0)
    scores = []
    for label in np.unique(y):
        hits = int(((predicted == label) & (y == label)).sum())
        wrong = int(((predicted == label) != (y == label)).sum())
        scores.append(2 * hits / (2 * hits + wrong))
    measured = {
        "loss": float(-np.log(of_true.astype(np.float64)).mean()),
        "accuracy": float((predicted == y).mean()),
        "f1_macro": float(np.mean(scores)),
    }
    if probabilities.shape[1] == 2 and 0 < y.sum() < len(y):
        from sklearn.metrics import average_precision_score, roc_auc_score

        measured["auc"] = float(roc_auc_score(y, probabilities[:, 1]))
        measured["average_precision"] = float(average_precision_score(y, probabilities[:, 1]))
    return measured


def labels(
    probabilities: npt.NDArray[np.floating],
    y: npt.NDArray[Any],
    predicted: npt.NDArray[np.integer] | None = None,
) -> dict[str, float]:
    """``loss`` (mean binary cross-entropy over samples and labels, nats), ``subset_accuracy`` (of
    samples with all labels right), ``f1_micro``.

    Means over labels are ``f1_macro``, over those that some sample has, and ``average_precision``
    and ``auc``, over those that some have and some have not.

    Args:
        probabilities: [n, labels]
        y: [n, labels] 1 for each that a sample has
        predicted: [n, labels] the same of the answer; default what is likelier than not
    """
    if predicted is None:
        predicted = (probabilities > 0.5).astype(np.int64)
    of_true = np.where(y == 1, probabilities, 1 - probabilities).astype(np.float64)
    measured = {
        "loss": float(-np.log(of_true.clip(SMALLEST, 1.0)).mean()),
        "subset_accuracy": float((predicted == y).all(axis=1).mean()),
        "f1_micro": _f1(predicted.ravel(), y.ravel()),
    }
    each = each_label(probabilities, y, predicted, range(y.shape[1])).values()
    for name, mean in (("f1", "f1_macro"), ("average_precision",) * 2, ("auc",) * 2):
        if values := [of[name] for of in each if of["samples"] and name in of]:
            measured[mean] = float(np.mean(values))
    return measured


def each_label(
    probabilities: npt.NDArray[np.floating],
    y: npt.NDArray[Any],
    predicted: npt.NDArray[np.integer],
    names: Iterable[Name],
) -> dict[Name, dict[str, float]]:
    """Label -> ``samples`` that have it, ``f1``, and where some have it and some have not ``auc``
    and ``average_precision``.

    Args:
        probabilities, y, predicted: see `labels`.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    found: dict[Name, dict[str, float]] = {}
    for name, of, has, said in zip(names, probabilities.T, y.T, predicted.T, strict=True):
        count = int(has.sum())
        found[name] = {"samples": float(count), "f1": _f1(said, has)}
        if 0 < count < len(has):
            found[name]["auc"] = float(roc_auc_score(has, of))
            found[name]["average_precision"] = float(average_precision_score(has, of))
    return found


def _f1(predicted: npt.NDArray[np.integer], y: npt.NDArray[Any]) -> float:
    """Of zeros and ones [n]; 0 where neither has a one."""
    hits = int(((predicted == 1) & (y == 1)).sum())
    return 2 * hits / max(1, int((predicted == 1).sum()) + int((y == 1).sum()))


def regression(
    values: npt.NDArray[np.floating], y: npt.NDArray[np.float64], deviation: float
) -> dict[str, float]:
    """``mae``, ``rmse`` (in the target's unit), ``r2``, and ``loss``, the squared error in units of
    the training targets' deviation.

    Args:
        values, y: [n] predicted and true
    """
    error = values - y
    squared = float((error**2).mean())
    spread = float(((y - y.mean()) ** 2).mean())
    return {
        "loss": squared / deviation**2,
        "mae": float(np.abs(error).mean()),
        "rmse": squared**0.5,
        "r2": 1.0 - squared / spread if spread > 0 else 0.0,
    }
