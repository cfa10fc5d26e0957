"""Metrics against scikit-learn's, and baselines that are worth beating."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference

from lepton_ray import data
from lepton_ray.config.schema import TableData
from lepton_ray.training import baselines, metrics
from lepton_ray.training.tasks import task_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 5])
def test_classification(classes: int) -> None:
    y = RNG.integers(0, classes, 400)
    probabilities = RNG.dirichlet(np.ones(classes), 400) + 0.3 * np.eye(classes)[y]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found = metrics.classification(probabilities, y)
    predicted = probabilities.argmax(1)
    expected = {
        "loss": reference.log_loss(y, probabilities),
        "accuracy": reference.accuracy_score(y, predicted),
        "f1_macro": reference.f1_score(y, predicted, average="macro"),
    }
    if classes == 2:
        expected["auc"] = reference.roc_auc_score(y, probabilities[:, 1])
        expected["average_precision"] = reference.average_precision_score(y, probabilities[:, 1])
    assert found == pytest.approx(expected)
    assert found.keys() <= metrics.DIRECTIONS.keys()


def test_one_class_in_a_split_has_no_auc() -> None:
    assert "auc" not in metrics.classification(np.full((9, 2), 0.5), np.zeros(9, np.int64))


def test_regression() -> None:
    y = RNG.normal(100, 20, 300)
    values = y + RNG.normal(0, 5, 300)
    found = metrics.regression(values, y, 20.0)
    assert found == pytest.approx(
        {
            "loss": reference.mean_squared_error(y, values) / 400,
            "mae": reference.mean_absolute_error(y, values),
            "rmse": reference.root_mean_squared_error(y, values),
            "r2": reference.r2_score(y, values),
        }
    )
    assert found.keys() <= metrics.DIRECTIONS.keys()


def test_a_regression_learns_in_units_of_the_training_targets_and_answers_in_its_own() -> None:
    dataset = data.load(
        TableData(kind="table", source="sklearn:diabetes", target="target", task="regression")
    )
    task, fitted = task_of(dataset), dataset.preprocess
    outputs = torch.tensor([[0.0], [1.0]])
    mean, deviation = fitted.target_mean, fitted.target_deviation
    assert task.answers(outputs, dataset.test)[:, 0].tolist() == [mean, mean + deviation]
    y = torch.tensor([mean, mean + 3 * deviation], dtype=torch.float64)
    assert float(task.loss(outputs, y)) == pytest.approx((0 + 4) / 2)
    truth = data.Samples(x=dataset.test.x[:2], y=y.numpy())
    assert task.measure(task.answers(outputs, truth), truth)["loss"] == pytest.approx(2.0)


def test_a_class_of_one_sample_does_not_stop_the_boosting(tmp_path: Path) -> None:
    """Above ten thousand rows it keeps some of each class aside."""
    n = 15_000
    kind = np.where(np.arange(n) % 2, "even", "odd")
    kind[:2] = "rare"
    pd.DataFrame({"x": np.arange(n) % 100, "y": kind}).to_csv(tmp_path / "t.csv", index=False)
    dataset = data.load(TableData(kind="table", source=str(tmp_path / "t.csv"), target="y"))
    rare = np.flatnonzero(dataset.train.y == dataset.schema.classes.index("rare"))
    dataset.train.y[rare[1:]] = 0
    assert np.bincount(dataset.train.y).min() == 1
    answers = baselines.boosting(dataset, 0)
    assert answers.sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "task", "metric", "least"),
    [("breast_cancer", "classification", "auc", 0.98), ("diabetes", "regression", "r2", 0.2)],
)
def test_baselines_are_worth_beating(name: str, task: str, metric: str, least: float) -> None:
    source = f"sklearn:{name}"
    dataset = data.load(TableData(kind="table", source=source, target="target", task=task))
    found = baselines.measure(dataset, seed=0)
    assert list(found) == ["baseline", "linear", "boosting"]
    assert found["linear"][metric] > least
    assert found["boosting"][metric] > least
    assert found["baseline"]["loss"] > found["linear"]["loss"]
