"""What an experiment file may say: frozen models, unknown keys refused.

One-field rules stand with the field; rules across sections stand in `Experiment`. Rules that need
the data, torch or a cluster are checked by ``plan``, not here, so that reading a file stays quick.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lepton_ray.config.schema.data import (
    Data,
    ImageData,
    ImagePreprocess,
    TextData,
    TextPreprocess,
)
from lepton_ray.config.schema.evaluation import Evaluate
from lepton_ray.config.schema.section import Section, Source
from lepton_ray.config.schema.sequences import (
    Covariates,
    Features,
    InteractionData,
    InteractionSplit,
    SeriesData,
    SeriesPreprocess,
    SeriesSplit,
)
from lepton_ray.config.schema.serving import (
    Batching,
    Canary,
    Gate,
    Limits,
    Replicas,
    Rule,
    Serve,
)
from lepton_ray.config.schema.splits import Split
from lepton_ray.config.schema.tables import TableData, TablePreprocess
from lepton_ray.config.schema.training import (
    Augment,
    Checkpoint,
    EarlyStop,
    Model,
    Optimizer,
    Schedule,
    Train,
    Workers,
)
from lepton_ray.config.schema.tuning import (
    Bound,
    Budget,
    Confirm,
    Distribution,
    Population,
    Tune,
)

__all__ = [
    "Augment",
    "Batching",
    "Bound",
    "Budget",
    "Canary",
    "Checkpoint",
    "Confirm",
    "Covariates",
    "Data",
    "Distribution",
    "EarlyStop",
    "Evaluate",
    "Experiment",
    "Features",
    "Gate",
    "ImageData",
    "ImagePreprocess",
    "InteractionData",
    "InteractionSplit",
    "Limits",
    "Model",
    "Optimizer",
    "Population",
    "Replicas",
    "Rule",
    "SCHEMA_VERSION",
    "Schedule",
    "SeriesData",
    "SeriesPreprocess",
    "SeriesSplit",
    "Serve",
    "Source",
    "Split",
    "TableData",
    "TablePreprocess",
    "TextData",
    "TextPreprocess",
    "Train",
    "Tune",
    "Workers",
]

SCHEMA_VERSION = 1


class Experiment(Section):
    version: Literal[1] = 1
    """Version of this format; older files are upgraded when read."""
    name: str
    """Names the MLflow experiment, the registered model and the folder of results."""
    data: Annotated[Data, Field(discriminator="kind")]
    model: Model
    train: Train = Train()
    workers: Workers = Workers()
    tune: Tune | None = None
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    serve: Serve = Serve()
    storage: str = "lepton_results"
    """Folder of results and checkpoints. At a URI (``s3://``, ``gs://``) lies what a run needs to
    go on, its state and its checkpoints; the rest stays under ``lepton_results``."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            raise ValueError(
                f"name must be up to 63 of a-z, 0-9, '-' and '_', starting with a letter or "
                f"digit, but got {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _across(self) -> Experiment:
        if "boosting" in self.gate.beats and self.data.kind not in ("table", "series"):
            raise ValueError(
                "gate.beats: boosting is measured for tables and series only: take it out of the "
                "list"
            )
        if self.train.augment is not None and self.data.kind != "image":
            raise ValueError(
                f"train.augment changes images, but data.kind is {self.data.kind}: leave it out"
            )
        if self.evaluate.slices and self.data.kind not in ("table", "text"):
            raise ValueError(
                f"evaluate.slices: are columns of a table or of texts, but data.kind is "
                f"{self.data.kind}: leave it out"
            )
        if self.train.exact and self.workers.max > self.train.n_shards:
            raise ValueError(
                f"workers.max must be at most the number of shards, but got {self.workers.max} "
                f"workers and {self.train.n_shards} shards: set train.shards to "
                f"{1 << (self.workers.max - 1).bit_length()} or workers.max to "
                f"{self.train.n_shards}"
            )
        return self
