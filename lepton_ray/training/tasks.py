"""What is learned: the loss of a batch, a model's outputs as answers, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import ExperimentError, nearest
from lepton_ray.training import metrics

Answers = npt.NDArray[np.floating]
"""[n, classes] probabilities, or [n, 1] values in the target's own unit."""

ClassWeights = Literal["balanced"] | Mapping[str, float] | None


@dataclass(frozen=True)
class Task:
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs [n, outputs], y [n]) -> mean loss of the samples"""
    answers: Callable[[Tensor], Answers]
    """outputs [n, outputs] -> answers"""
    measure: Callable[[Answers, npt.NDArray[Any]], dict[str, float]]
    """(answers, y [n]) -> metrics by name; `metrics.DIRECTIONS` says which way is better"""


def task_of(dataset: Dataset, class_weights: ClassWeights = None) -> Task:
    """Classification where there are classes, else regression.

    Raises:
        ExperimentError: for weights of classes that are none.
    """
    if dataset.schema.classes:
        cost: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
        if class_weights is not None:
            cost = _weighted(_weights(dataset, class_weights))
        return Task(cost, _probabilities, metrics.classification)
    if class_weights is not None:
        raise ExperimentError(
            "experiment", ["train.class_weights: a number to predict has no classes: leave it out"]
        )
    fitted = dataset.preprocess

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if fitted.target_log:
            y = y.sign() * y.abs().log1p()
        scaled = (y - fitted.target_mean) / fitted.target_deviation
        return functional.mse_loss(outputs[:, 0], scaled.float())

    def answers(outputs: Tensor) -> Answers:
        return fitted.target_values(outputs.cpu().numpy())

    def measure(values: Answers, y: npt.NDArray[Any]) -> dict[str, float]:
        found = metrics.regression(
            values[:, 0], y.astype(np.float64), dataset.preprocess.target_deviation
        )
        if fitted.target_log:  # as what is learned, not as what it stands for
            error = fitted.scaled_target(values[:, 0]) - fitted.scaled_target(y)
            found["loss"] = float((error**2).mean())
        return found

    return Task(loss, answers, measure)


def _weights(dataset: Dataset, asked: Literal["balanced"] | Mapping[str, float]) -> Tensor:
    """[classes] With a mean of 1 over the training samples."""
    classes, y = dataset.schema.classes, dataset.train.y.astype(np.int64)
    counts = np.bincount(y, minlength=len(classes))
    if asked == "balanced":
        weights = 1.0 / counts
    else:
        for name in asked:
            if name not in classes:
                raise ExperimentError(
                    "experiment",
                    [f"train.class_weights: no class {name!r}, {nearest(name, classes)}"],
                )
        weights = np.array([asked.get(name, 1.0) for name in classes])
    return torch.tensor(weights * len(y) / (weights * counts).sum(), dtype=torch.float32)


def _weighted(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        # Not cross_entropy's own weights: it divides by their sum, which differs from shard to
        # shard, so the mean over shards would not be that over the batch.
        each = functional.cross_entropy(outputs, y, reduction="none")
        return (each * weights.to(outputs.device)[y]).mean()

    return loss


def _probabilities(outputs: Tensor) -> Answers:
    return torch.softmax(outputs.float(), dim=1).cpu().numpy()
