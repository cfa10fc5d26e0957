"""What is learned: the loss of a batch, a model's outputs as answers, and how good they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lepton_ray.data.dataset import Dataset
from lepton_ray.training import metrics

Answers = npt.NDArray[np.floating]
"""[n, classes] probabilities, or [n, 1] values in the target's own unit."""


@dataclass(frozen=True)
class Task:
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs [n, outputs], y [n]) -> mean loss of the samples"""
    answers: Callable[[Tensor], Answers]
    """outputs [n, outputs] -> answers"""
    measure: Callable[[Answers, npt.NDArray[Any]], dict[str, float]]
    """(answers, y [n]) -> metrics by name; `metrics.DIRECTIONS` says which way is better"""


def task_of(dataset: Dataset) -> Task:
    """Classification where there are classes, else regression."""
    if dataset.schema.classes:
        return Task(functional.cross_entropy, _probabilities, metrics.classification)
    mean, deviation = dataset.preprocess.target_mean, dataset.preprocess.target_deviation

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(outputs[:, 0], ((y - mean) / deviation).float())

    def answers(outputs: Tensor) -> Answers:
        return outputs.cpu().numpy().astype(np.float64) * deviation + mean

    def measure(values: Answers, y: npt.NDArray[Any]) -> dict[str, float]:
        return metrics.regression(values[:, 0], y.astype(np.float64), deviation)

    return Task(loss, answers, measure)


def _probabilities(outputs: Tensor) -> Answers:
    return torch.softmax(outputs.float(), dim=1).cpu().numpy()
