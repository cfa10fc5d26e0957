"""Forms of a version that are trained: a smaller model that learns from it, or is cut out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lepton_ray import models
from lepton_ray.config import with_settings
from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import InputError
from lepton_ray.models.pruning import PRUNABLE, prune
from lepton_ray.pipeline.version import write_version
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving import smaller
from lepton_ray.serving.runtime import CHUNK, OnnxModel
from lepton_ray.training import determinism
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.distillation import Taught
from lepton_ray.training.loop import Replica
from lepton_ray.training.state import initial_state

METHODS = ("distilled", "pruned")
FINE_TUNING = {"epochs": 1 / 3, "lr": 0.3}  # shares of the experiment's own
RETRAINED = ("format", "files", "weights_sha256", "parity", "training_digest")


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained form, as the folder of a version."""

    folder: Path
    training_s: float


def settings(experiment: Experiment, asked: str | None) -> dict[str, int]:
    """The model's setting that a student has smaller: half the width, or what is asked for.

    Args:
        asked: ``NAME=VALUE``, as in ``width=8``.

    Raises:
        InputError: when the model has no such setting, or the value is not smaller.
    """
    name, _, value = (asked or "width").partition("=")
    known = models.parameters(experiment.model.name) or {}
    present = experiment.model.params.get(name, known.get(name))
    if not isinstance(present, int) or isinstance(present, bool):
        numbers = [n for n, v in {**known, **experiment.model.params}.items() if type(v) is int]
        raise InputError(
            f"{experiment.model.name} has no whole number {name!r} to make smaller: give --student "
            f"NAME=VALUE with one of its own ({', '.join(numbers) or 'it has none'})"
        )
    text = value if asked else str(present // 2)
    if not text.isdecimal() or not 1 <= int(text) < present:
        raise InputError(
            f"a student's {name} is a whole number of at least 1 and below the {present} of its "
            f"teacher, but got {text!r}: give --student {name}={max(1, present // 2)}"
        )
    return {f"model.{name}": int(text)}


def train(
    method: str,
    asked: str | None,
    experiment: Experiment,
    dataset: Dataset,
    teacher: Path,
    folder: Path,
    progress: Callable[[str], None],
) -> Student:
    """Train a student on the CPU, in this process, and write it as a version into ``folder``.

    Args:
        method: one of `METHODS`.
        teacher: folder of the version.

    Raises:
        InputError: when there is no such student of this model or task.
    """
    student = with_settings(experiment, settings(experiment, asked))
    start = time.monotonic()
    checkpoints = None
    if method == "distilled":
        taught = _taught(dataset, teacher)
    else:
        taught, student = dataset, _fine_tuning(student)
        checkpoints = CheckpointFolder(str(folder.with_name("pruned-checkpoints")))
        _cut(experiment, student, dataset, teacher, checkpoints)
    replica = Replica(student, taught, checkpoints=checkpoints)
    for _ in replica.epochs():
        progress(f"{method}: epoch {replica.epoch} of {student.train.epochs}")
    model = _built(student, dataset)
    model.load_state_dict(replica.state.final_weights())
    training_s = time.monotonic() - start
    before = {k: v for k, v in manifests.verify(teacher).items() if k not in RETRAINED}
    origin = {**before, "training_digest": replica.state.digest}
    write_version(folder, model, student, dataset, origin)
    return Student(folder=folder, training_s=training_s)


def _taught(dataset: Dataset, teacher: Path) -> Dataset:
    if dataset.schema.task != "classification":
        raise InputError(
            f"only what tells classes apart can be distilled, and this is a {dataset.schema.task}"
        )
    x, y = dataset.train.x, dataset.train.y
    logits = smaller.outputs(OnnxModel(teacher / "model.onnx"), x, CHUNK)
    return replace(dataset, train=Taught(x=x, y=y, logits=logits))


def _fine_tuning(student: Experiment) -> Experiment:
    train = student.train
    return with_settings(
        student,
        {
            "train.epochs": max(1, round(train.epochs * FINE_TUNING["epochs"])),
            "train.optimizer.lr": train.optimizer.lr * FINE_TUNING["lr"],
        },
    )


def _cut(
    experiment: Experiment,
    student: Experiment,
    dataset: Dataset,
    teacher: Path,
    checkpoints: CheckpointFolder,
) -> None:
    """Leave the pruned weights where the student's training goes on from."""
    if experiment.model.name not in PRUNABLE:
        raise InputError(
            f"{' and '.join(PRUNABLE)} can be pruned, {experiment.model.name} cannot: its channels "
            "are tied to each other"
        )
    large = _built(experiment, dataset)
    large.load_state_dict(torch.export.load(teacher / "model.pt2").state_dict)
    device = torch.device("cpu")
    profile = determinism.configure(student.train, device)
    state = initial_state(student, dataset, device)
    for module in (state.model, state.averaged):
        if module is not None:
            try:
                module.load_state_dict(prune(large, module))
            except ValueError as error:
                raise InputError(f"only the width can be pruned, not this: {error}") from error
    tensors, values = state.dump()
    checkpoints.save(0, tensors, {**values, "profile": profile.to_json()})


def _built(experiment: Experiment, dataset: Dataset) -> Any:
    shape = dataset.preprocess.input_shape
    return models.build(experiment.model, shape, dataset.schema.outputs, dataset.facts)
