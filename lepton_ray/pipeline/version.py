"""A trained model as the folder of a version: the same way for a run and for a student of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lepton_ray.config import render
from lepton_ray.config.schema import Experiment
from lepton_ray.data import decision
from lepton_ray.data.dataset import Dataset
from lepton_ray.pipeline import carried
from lepton_ray.serving import package

COMPARED = 256  # test samples on which the forms of a model must answer alike


def write_version(
    folder: Path,
    model: nn.Module,
    experiment: Experiment,
    dataset: Dataset,
    provenance: Mapping[str, Any],
) -> dict[str, bytes]:
    """Write it, with thresholds and calibration from the validation split.

    Args:
        provenance: for the manifest.

    Returns:
        What it carries for people, see `carried.files`.

    Raises:
        RunError: see `package.build`.
    """
    beside = carried.files(model, dataset, examples=experiment.serve.examples)
    decided = decision.plain(dataset.schema)
    if dataset.schema.classes:
        logits = package.outputs(model, dataset.validation.x)
        fit = decision.fit_labels if dataset.schema.task == "multilabel" else decision.fit
        decided = fit(logits, dataset.validation.y, experiment.evaluate)
    package.build(
        folder,
        model=model,
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        decision=decided,
        experiment_yaml=render(experiment),
        sample_x=dataset.test.x[:COMPARED],
        max_batch=experiment.serve.batch.largest,
        provenance=dict(provenance),
        beside=beside,
    )
    return beside
