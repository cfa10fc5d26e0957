"""Calibrated probabilities, the threshold of two classes, and metrics of groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from lepton_ray import data
from lepton_ray.config.schema import Evaluate, Experiment, Model, TableData
from lepton_ray.data import decision
from lepton_ray.data.decision import Decision
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.pipeline import checks, reports
from lepton_ray.serving.runtime import Runtime
from tests import apps


def answers(n: int = 4000, scale: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right when they are multiplied and shifted, and what came true."""
    rng = np.random.default_rng(0)
    true = rng.normal(-1.5, 1.5, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-true))).astype(np.int64)
    logits = np.stack([np.zeros(n), (true - shift) / scale], 1)
    return logits.astype(np.float32), y


def loss(found: Decision, logits: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(found.probabilities(logits)[np.arange(len(y)), y]).mean())


def test_a_temperature_takes_back_too_much_confidence() -> None:
    logits, y = answers(scale=0.25)
    found = decision.fit(logits, y, Evaluate(calibrate="temperature"))
    assert found.scale == pytest.approx(0.25, rel=0.1)
    assert (found.shift, found.threshold) == (0.0, 0.5)
    assert loss(found, logits, y) < loss(Decision(), logits, y)


def test_platt_takes_back_a_shift_too() -> None:
    logits, y = answers(scale=0.5, shift=-1.5)
    found = decision.fit(logits, y, Evaluate(calibrate="platt"))
    assert (found.scale, found.shift) == (pytest.approx(0.5, rel=0.1), pytest.approx(-1.5, abs=0.2))


def test_classes_that_can_be_told_apart_leave_the_scale_finite() -> None:
    logits, y = answers()
    found = decision.fit(logits, (logits[:, 1] > 0).astype(np.int64), Evaluate(calibrate="platt"))
    assert np.isfinite([found.scale, found.shift]).all()


def test_a_threshold_is_the_best_one_there_is() -> None:
    logits, y = answers(400)
    found = decision.fit(logits, y, Evaluate(threshold="f1"))
    second = found.probabilities(logits)[:, 1]
    best = max(f1_score(y, second > t) for t in np.unique(second))
    assert f1_score(y, found.chosen(found.probabilities(logits))) == pytest.approx(best)
    assert found.threshold < 0.5  # the second class is the rarer


@pytest.mark.parametrize("name", ["f1_macro", "accuracy", "balanced_accuracy"])
def test_other_scores_choose_as_scikit_learn_would(name: str) -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    scores = {
        "f1_macro": lambda y, p: f1_score(y, p, average="macro"),
        "accuracy": accuracy_score,
        "balanced_accuracy": balanced_accuracy_score,
    }
    logits, y = answers(400)
    found = decision.fit(logits, y, Evaluate.model_validate({"threshold": name}))
    second = found.probabilities(logits)[:, 1]
    best = max(scores[name](y, (second > t).astype(int)) for t in np.unique(second))
    assert scores[name](y, found.chosen(found.probabilities(logits))) == pytest.approx(best)


@pytest.mark.parametrize(
    ("asked", "classes", "said"),
    [
        ({"threshold": "f1"}, 3, "threshold: f1 is for two classes, but there are 3"),
        ({"threshold": 0.2}, 0, "threshold: 0.2 is for two classes, but there are none"),
        ({"calibrate": "platt"}, 3, "platt is for two classes, but there are 3: leave it out"),
        ({"calibrate": "temperature"}, 0, "temperature is for classes, but there are none"),
    ],
)
def test_what_needs_other_classes_is_refused(asked: dict, classes: int, said: str) -> None:
    schema = data.Schema(columns=(), target="y", classes=tuple(map(str, range(classes))))
    with pytest.raises(ExperimentError, match=said):
        decision.check(Evaluate.model_validate(asked), schema)


@pytest.fixture
def dataset(tmp_path: Path) -> data.Dataset:
    frame = pd.DataFrame(
        {
            "age": np.arange(300.0),
            "sex": ["f", "m", None] * 100,
            "y": ["yes", "no"] * 150,
        }
    )
    frame.to_csv(tmp_path / "people.csv", index=False)
    settings = TableData(kind="table", source=str(tmp_path / "people.csv"), target="y")
    return data.load(settings, ["sex", "age"])


def test_a_decision_travels_with_a_version(tmp_path: Path, dataset: data.Dataset) -> None:
    model = Model(name="linear")
    plain = apps.version(tmp_path / "a", dataset, model, "plain")
    second = plain.predict_columns(dataset.test_columns)[:, 1]
    decided = Decision(scale=0.5, shift=0.1, threshold=0.9)
    apps.version(tmp_path / "b", dataset, model, "decided", decided)
    runtime = Runtime.load(tmp_path / "b")
    assert runtime.decision == decided
    odds = np.log(second / (1 - second)) * 0.5 + 0.1
    found = runtime.predict_columns(dataset.test_columns)
    assert found[:, 1] == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
    labels = [answer.label for answer in runtime.answers(found)]
    assert labels == ["yes" if p > 0.9 else "no" for p in found[:, 1]]
    accuracy = checks.score(runtime, dataset)["accuracy"]
    truth = np.array(dataset.schema.classes)[dataset.test.y]
    assert accuracy == pytest.approx((truth == np.array(labels)).mean())


def test_groups_are_measured_apart(tmp_path: Path, dataset: data.Dataset) -> None:
    runtime = apps.version(tmp_path / "v", dataset, Model(name="linear"), "people")
    found = checks.score_slices(runtime, dataset)
    assert set(found["sex"]) == {"f", "m", "(none)"}
    assert len(found["age"]) == 4  # quarters
    whole = checks.score(runtime, dataset)
    for groups in found.values():
        n = sum(m["samples"] for m in groups.values())
        right = sum(m["samples"] * m["accuracy"] for m in groups.values())
        assert (n, right / n) == (len(dataset.test), pytest.approx(whole["accuracy"]))
    table = reports.slice_table("sex", found["sex"])
    assert table.splitlines()[0].split() == ["slices", "of", "sex", *found["sex"]["f"]]
    assert "(none)" in table


def test_a_slice_by_no_column_is_refused(tmp_path: Path, dataset: data.Dataset) -> None:
    settings = TableData(kind="table", source=str(tmp_path / "people.csv"), target="y")
    with pytest.raises(DataError, match="evaluate.slices: no column 'sexx', did you mean 'sex'"):
        data.load(settings, ["sexx"])
    images = {"kind": "image", "source": "sklearn:digits"}
    with pytest.raises(ValueError, match="slices: are columns of a table or of texts"):
        Experiment.model_validate(
            {"name": "a", "data": images, "model": {"name": "cnn"}, "evaluate": {"slices": ["x"]}}
        )
