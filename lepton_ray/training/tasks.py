"""What is learned: the loss of a batch, a model's outputs as answers, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.errors import ExperimentError, nearest
from lepton_ray.training import forecasts, metrics, rankings

Answers = npt.NDArray[np.floating]
"""[n, classes] probabilities, [n, items] scores, or [n, steps] values in the target's own unit."""

ClassWeights = Literal["balanced"] | Mapping[str, float] | None


@dataclass(frozen=True)
class Task:
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs [n, outputs], y [n, ...] of a batch) -> mean loss of the samples"""
    answers: Callable[[Tensor, Samples], Answers]
    """(outputs [n, outputs], what they are for) -> answers"""
    measure: Callable[[Answers, Samples], dict[str, float]]
    """(answers, samples) -> metrics by name; `metrics.direction` says which way is better"""


def task_of(dataset: Dataset, class_weights: ClassWeights = None) -> Task:
    """What the schema says is answered.

    Raises:
        ExperimentError: for weights of classes that are none.
    """
    schema = dataset.schema
    if schema.classes:
        cost: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
        if class_weights is not None:
            cost = _weighted(_weights(dataset, class_weights))
        return Task(
            cost,
            lambda outputs, samples: _probabilities(outputs),
            lambda answers, samples: metrics.classification(answers, samples.y),
        )
    if class_weights is not None:
        raise ExperimentError(
            "experiment", [f"train.class_weights: {schema.answer} has no classes: leave it out"]
        )
    if schema.task == "ranking":
        return Task(
            functional.cross_entropy,
            lambda outputs, samples: outputs.cpu().numpy(),
            lambda scores, samples: rankings.measure(scores, samples.y, schema.top_k),
        )
    if schema.task == "forecast":
        return Task(forecasts.loss, forecasts.answers, forecasts.measure)
    fitted = dataset.preprocess
    assert isinstance(fitted, Preprocess | InteractionFit)

    log = fitted if isinstance(fitted, Preprocess) and fitted.target_log else None

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if log is not None:
            y = y.sign() * y.abs().log1p()
        scaled = (y - fitted.target_mean) / fitted.target_deviation
        return functional.mse_loss(outputs[:, 0], scaled.float())

    def answers(outputs: Tensor, samples: Samples) -> Answers:
        return fitted.restore(outputs.cpu().numpy(), samples.x)

    def measure(values: Answers, samples: Samples) -> dict[str, float]:
        y = samples.y.astype(np.float64)
        found = metrics.regression(values[:, 0], y, fitted.target_deviation)
        if log is not None:  # as what is learned, not as what it stands for
            error = log.scaled_target(values[:, 0]) - log.scaled_target(y)
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
