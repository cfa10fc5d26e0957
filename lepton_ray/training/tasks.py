"""What is learned: the loss of a batch, a model's outputs as answers, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lepton_ray.training import distillation, forecasts, metrics, rankings

Answers = npt.NDArray[np.floating]
"""[n, classes] probabilities (that sum to 1, or of each label), [n, items] scores, or [n, steps]
values in the target's own unit."""

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
    if schema.task == "multilabel":
        weights = None if class_weights is None else _label_weights(dataset, class_weights)
        return Task(
            _label_loss(weights),
            lambda outputs, samples: torch.sigmoid(outputs.float()).cpu().numpy(),
            lambda answers, samples: metrics.labels(answers, samples.y),
        )
    if schema.classes:
        cost: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
        if class_weights is not None:
            cost = _weighted(_weights(dataset, class_weights))
        if isinstance(dataset.train, distillation.Taught):
            cost = distillation.loss(cost)
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
        _check_names(asked, classes, "class")
        weights = np.array([asked.get(name, 1.0) for name in classes])
    return torch.tensor(weights * len(y) / (weights * counts).sum(), dtype=torch.float32)


def _label_weights(
    dataset: Dataset, asked: Literal["balanced"] | Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """[labels] What it costs to see a label where it is not, and to miss it; of each label with a
    mean of 1 over the training samples."""
    classes, y = dataset.schema.classes, dataset.train.y
    have = y.sum(axis=0, dtype=np.int64)
    have_not = len(y) - have
    if asked == "balanced":
        missed = have_not / have
    else:
        _check_names(asked, classes, "label")
        missed = np.array([asked.get(name, 1.0) for name in classes])
    mean = (missed * have + have_not) / len(y)
    return torch.from_numpy(1.0 / mean).float(), torch.from_numpy(missed / mean).float()


def _check_names(asked: Mapping[str, float], known: Sequence[str], what: str) -> None:
    for name in asked:
        if name not in known:
            problem = f"train.class_weights: no {what} {name!r}, {nearest(name, known)}"
            raise ExperimentError("experiment", [problem])


def _label_loss(weights: tuple[Tensor, Tensor] | None) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(outputs, y.float(), reduction="none")
        if weights is not None:
            seen, missed = (weight.to(outputs.device) for weight in weights)
            each = each * torch.where(y > 0, missed, seen)
        return each.mean()

    return loss


def _weighted(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        # Not cross_entropy's own weights: it divides by their sum, which differs from shard to
        # shard, so the mean over shards would not be that over the batch.
        each = functional.cross_entropy(outputs, y, reduction="none")
        return (each * weights.to(outputs.device)[y]).mean()

    return loss


def _probabilities(outputs: Tensor) -> Answers:
    return torch.softmax(outputs.float(), dim=1).cpu().numpy()
