"""Registered versions of small models, made without a run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lepton_ray.config import render
from lepton_ray.config.schema import Experiment
from lepton_ray.data import Dataset
from lepton_ray.serving import drift, package
from lepton_ray.serving.signature import signature
from lepton_ray.tracking import registry
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.tracking.store import Tracker


def register(
    experiment: Experiment, dataset: Dataset, model: nn.Module, root: Path, digest: str = ""
) -> ModelVersion:
    """A version in the registry that MLFLOW_TRACKING_URI names; its files go under ``root``.

    Args:
        digest: of the data, as the manifest says; the dataset's own by default.
    """
    package.build(
        root / "version",
        model=model,
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        experiment_yaml=render(experiment),
        sample_x=dataset.test.x[:64],
        max_batch=64,
        provenance={"data_digest": digest or dataset.digest, **drift.to_json(dataset.bins)},
    )
    return registry.register(
        experiment.name,
        run_id=Tracker(experiment.name, root).start("test"),
        folder=root / "version",
        python_model=Path(package.__file__).with_name("pyfunc_model.py"),
        signature=signature(dataset.schema),
        tags={},
    )
