"""Metrics of classification from probabilities, and which way is better."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIRECTIONS = {"loss": "min", "accuracy": "max", "f1_macro": "max"}
"""Every metric of a test split, and whether less or more of it is better."""

SMALLEST = 1e-7  # a class given probability 0 would make the loss infinite


def classification(
    probabilities: npt.NDArray[np.floating], y: npt.NDArray[np.int64]
) -> dict[str, float]:
    """``loss`` (mean cross-entropy, nats), ``accuracy`` and ``f1_macro``.

    Args:
        probabilities: [n, classes]
        y: [n] index of the true class
    """
    predicted = probabilities.argmax(1)
    of_true = probabilities[np.arange(len(y)), y].clip(SMALLEST, 1.0)
    scores = []
    for label in np.unique(y):
        hits = int(((predicted == label) & (y == label)).sum())
        wrong = int(((predicted == label) != (y == label)).sum())
        scores.append(2 * hits / (2 * hits + wrong))
    return {
        "loss": float(-np.log(of_true.astype(np.float64)).mean()),
        "accuracy": float((predicted == y).mean()),
        "f1_macro": float(np.mean(scores)),
    }
