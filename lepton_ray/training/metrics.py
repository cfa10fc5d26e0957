"""Metrics of answers, and which way is better."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

DIRECTIONS = {
    "loss": "min",
    "accuracy": "max",
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
