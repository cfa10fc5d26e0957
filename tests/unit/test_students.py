"""Students of a version: how they are chosen, what they learn from, and what pruning keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lepton_ray import models
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment, Model
from lepton_ray.data import Dataset, load
from lepton_ray.errors import GateError, InputError
from lepton_ray.models.pruning import prune
from lepton_ray.pipeline import optimize, students
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import registry
from lepton_ray.training import distillation
from lepton_ray.training.distillation import SOFT, TEMPERATURE, Taught
from tests import apps, stores
from tests.elastic import Generation, train
from tests.terminal import Lines
from tests.versions import register


def experiment(name: str = "cnn", /, storage: str = "results", **settings: object) -> Experiment:
    return validate(
        {
            "name": "students",
            "data": {
                "kind": "image",
                "source": "sklearn:digits",
                "split": {"test": 0.5, "validation": 0.2},
            },
            "model": {"name": name, **settings},
            "train": {"epochs": 2, "batch": 64, "shards": 8, "optimizer": {"lr": 0.003}},
            "storage": storage,
        }
    )


def test_a_student_has_half_the_width_or_what_is_asked_for() -> None:
    assert students.settings(experiment(), None) == {"model.width": 16}
    assert students.settings(experiment("mlp", width=7), None) == {"model.width": 3}
    assert students.settings(experiment("mlp"), "depth=1") == {"model.depth": 1}
    for name, asked, said in [
        ("linear", None, "linear has no whole number 'width'.*it has none"),
        ("cnn", "size=3", "no whole number 'size' .*width, blocks"),
        ("cnn", "width=32", "below the 32 of its teacher, but got '32': give --student width=16"),
        ("cnn", "width=0", "at least 1"),
        ("cnn", "width", "but got ''"),
        ("cnn", "dropout=0", "no whole number 'dropout'"),
    ]:
        with pytest.raises(InputError, match=said):
            students.settings(experiment(name), asked)


def test_the_loss_of_a_student() -> None:
    outputs, logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), [[2.0, 0.0], [-1.0, 4.0]]
    y = torch.tensor([[0.0, *logits[0]], [1.0, *logits[1]]])

    def probability(pair: list[float], temperature: float) -> list[float]:
        first = 1 / (1 + math.exp((pair[1] - pair[0]) / temperature))
        return [first, 1 - first]

    hard = soft = 0.0
    for ours, theirs, right in zip(outputs.tolist(), logits, (0, 1), strict=True):
        hard -= math.log(probability(ours, 1)[right]) / 2
        mine, given = probability(ours, TEMPERATURE), probability(theirs, TEMPERATURE)
        soft += sum(p * math.log(p / q) for p, q in zip(given, mine, strict=True)) / 2
    found = float(distillation.loss(functional.cross_entropy)(outputs, y))
    assert found == pytest.approx((1 - SOFT) * hard + SOFT * TEMPERATURE**2 * soft, rel=1e-5)


def taught(dataset: Dataset) -> Dataset:
    """By a teacher who knows the classes, and confuses each with the next."""
    sure = np.eye(len(dataset.schema.classes), dtype=np.float32)[dataset.train.y]
    logits = 6 * sure + 3 * np.roll(sure, 1, axis=1)
    return replace(dataset, train=Taught(x=dataset.train.x, y=dataset.train.y, logits=logits))


def test_a_student_is_the_same_bytes_for_one_and_two_replicas() -> None:
    asked = experiment("mlp", width=16)
    alone, both = (train(asked, [Generation(size)], prepare=taught) for size in (1, 2))
    assert alone == both
    assert alone.sha256 != train(asked, [Generation(1)]).sha256, "it learns from its teacher"


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_pruned_model_answers_as_the_large_one_without_those_channels(name: str) -> None:
    shape = (1, 9, 9)  # of which a halving leaves some out
    torch.manual_seed(0)
    large, small = (
        models.build(Model(name=name, width=width), shape, 5).eval() for width in (8, 3)
    )
    for layer in large:
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.nn.init.uniform_(values.detach(), 0.1, 1)
    state = prune(large, small)
    small.load_state_dict(state)
    hidden = [layer for layer in large if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)][:-1]
    x = torch.randn(6, *shape)
    assert not torch.allclose(large(x), small(x), atol=1e-3)
    with torch.no_grad():
        for layer, left in zip(hidden, (3, 6) if name == "cnn" else (3, 3), strict=True):
            weak = layer.weight.abs().flatten(1).sum(1).argsort()[: len(layer.weight) - left]
            follower = large[list(large).index(layer) + 1]
            behind = follower if isinstance(follower, torch.nn.BatchNorm2d) else layer
            behind.weight[weak] = behind.bias[weak] = 0
    torch.testing.assert_close(large(x), small(x))
    with pytest.raises(ValueError, match="fewer than"):
        prune(small, large)


def test_students_are_trained_measured_and_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "CALLS", 3)
    monkeypatch.setattr(optimize.smaller, "quantized", lambda *_: {"int8": "cannot be made: no"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    asked = experiment("mlp", width=64, storage=str(tmp_path / "results"))
    dataset = load(asked.data)
    threads = torch.get_num_threads()
    register(asked, dataset, apps.fitted(dataset, asked.model), tmp_path)
    terminal = Lines()
    options = {"smallest": True, "terminal": terminal, "methods": students.METHODS}
    done = optimize.optimize("students/1", lose=0.9, **options)
    torch.set_num_threads(threads)
    forms = {c["name"]: c for c in done["candidates"]}
    assert forms["distilled"]["training_s"] > 0 < forms["pruned"]["training_s"]
    assert forms["pruned"]["bytes"] < 0.6 * forms[optimize.PRESENT]["bytes"]
    assert forms["pruned"]["validation"]["accuracy"] > 0.8, "it begins with its teacher's weights"
    assert done["failed"] == {"int8": "cannot be made: no"}
    made = load_model(f"students/{done['version']}")
    assert made.manifest["optimized"]["form"] == done["taken"]
    assert made.manifest["optimized"]["of"] == "students/1"
    version = registry.resolve("students/2")
    assert "width: 32" in (version.folder() / "experiment.yaml").read_text()
    assert version.tags["lepton_ray.weights_sha256"] == made.manifest["weights_sha256"]

    monkeypatch.setattr(students, "prune", lambda *_: 1 / 0)
    with pytest.raises(GateError, match="stays as it is"):
        optimize.optimize("students/1", lose=0.0, **{**options, "methods": ["pruned"]})
    said = terminal.said[-1]
    assert "division by zero" in said
    assert optimize.PRESENT in said, "one that fails loses no other"
    with pytest.raises(InputError, match="add --distill or --prune"):
        optimize.optimize(
            "students/1", smallest=True, lose=0.0, terminal=terminal, student="width=1"
        )
