"""What an experiment file may say: frozen models, unknown keys refused.

One-field rules stand with the field; rules across sections stand in `Experiment`. Rules that need
the data, torch or a cluster are checked by ``plan``, not here, so that reading a file stays quick.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

SCHEMA_VERSION = 1


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class OpenSection(Section):
    """A section whose further keys go to a function by name (a model, an optimizer)."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The keys besides ``name``."""
        return dict(self.model_extra or {})


class Split(Section):
    test: Literal["given"] | Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the samples held out for the gate, or ``given``: the source brings its own."""
    column: str | None = None
    """The column of a table or of texts that says ``train`` or ``test`` of every row."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the remaining samples that tuning and early stopping look at."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _column_is_given(self) -> Split:
        if self.column is not None and self.test != "given":
            raise ValueError(
                f"a split by column {self.column!r} needs test: given, but got {self.test}"
            )
        return self

    @model_validator(mode="after")
    def _leaves_training_data(self) -> Split:
        if self.test != "given" and self.test + self.validation >= 1:
            raise ValueError(
                f"test + validation < 1 must hold, but got {self.test} + {self.validation}"
            )
        return self


Side = Annotated[int, Field(ge=1, le=1024)]


class ImagePreprocess(Section):
    size: tuple[Side, Side] | None = None
    """Pixels [height, width] that the pictures of a folder are scaled to; what is over is cut off.
    Default: their median, made smaller to a longer side of 64."""
    color: Literal["grey", "rgb"] | None = None
    """What the pictures of a folder become. Default: grey if all are."""
    normalize: bool = True
    """Subtract the training split's mean and divide by its deviation, per channel."""


class TablePreprocess(Section):
    missing: Literal["refuse", "median"] = "refuse"
    """What an empty number is: an error, or the training split's median."""


class TextPreprocess(Section):
    vocabulary: int = Field(30_000, ge=1)
    """Words the model knows: the most frequent of the training split. All others are one word."""
    length: int = Field(256, ge=1)
    """Words of a text the model sees. A longer one is cut, and ``plan`` says of how many."""
    characters: int = Field(100_000, ge=1)
    """Characters a text may have: in the source, in a file to predict, and over HTTP."""


def _distinct(columns: dict[str, str | None]) -> None:
    """Raise where two settings name one column."""
    for (first, column), (second, other) in itertools.combinations(columns.items(), 2):
        if column == other:
            raise ValueError(f"{first} and {second} must be two columns, but both are {column!r}")


class ImageData(Section):
    kind: Literal["image"]
    source: str
    """A folder with a folder of pictures for each class, or with ``train/`` and ``test/`` of such;
    a folder with the IDX files of MNIST, an ``.npz`` with x and y, or ``sklearn:digits``."""
    max_bad: float = Field(0.01, ge=0, lt=1)
    """Share of a folder's pictures that may be unreadable; they are named and left out."""
    split: Split = Split()
    preprocess: ImagePreprocess = ImagePreprocess()

    @field_validator("split")
    @classmethod
    def _has_no_columns(cls, split: Split) -> Split:
        if split.column is not None:
            raise ValueError(f"images have no columns to split by, but got {split.column!r}")
        return split


class TableData(Section):
    kind: Literal["table"]
    source: str
    """A CSV, Parquet or JSONL file, or ``sklearn:`` and breast_cancer, diabetes, iris or wine."""
    target: str
    """The column to predict."""
    task: Literal["classification", "regression"] = "classification"
    """Whether the target is one of some classes or a number."""
    drop: tuple[str, ...] = ()
    """Columns that are not features (an id, a leak)."""
    split: Split = Split()
    preprocess: TablePreprocess = TablePreprocess()

    @model_validator(mode="after")
    def _splits_by_a_column_of_its_own(self) -> TableData:
        _distinct({"target": self.target, "split.column": self.split.column})
        return self


class TextData(Section):
    kind: Literal["text"]
    source: str
    """A CSV, Parquet or JSONL file, in UTF-8."""
    text: str
    """The column of texts. An empty cell is an empty text."""
    target: str
    """The column of classes to predict."""
    split: Split = Split()
    preprocess: TextPreprocess = TextPreprocess()

    @model_validator(mode="after")
    def _reads_no_answer(self) -> TextData:
        named = {"text": self.text, "target": self.target, "split.column": self.split.column}
        _distinct(named)
        return self


Data = ImageData | TableData | TextData


class Model(OpenSection):
    """``name`` is a built-in model or ``package.module:function``; the rest are its arguments."""


class Optimizer(OpenSection):
    """``name`` is any class of torch.optim, in any case; the rest are its arguments."""

    name: str = "adamw"
    lr: float = Field(1e-3, gt=0)


class Schedule(Section):
    name: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero."""
    every: float = Field(0.3, gt=0, le=1)
    """``step`` only: share of all steps between two drops."""
    factor: float = Field(0.1, gt=0, lt=1)
    """``step`` only: what the learning rate is multiplied by at a drop."""


class EarlyStop(Section):
    metric: str = "val_loss"
    patience: int = Field(3, ge=1)
    """Epochs without a better value before training ends; the best epoch's weights are kept."""


class Checkpoint(Section):
    every_s: float = Field(30.0, gt=0)
    """Seconds between two checkpoints, counted by the replica that writes them."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between two checkpoints; whichever of the two comes first."""
    keep: int = Field(2, ge=1)
    """How many of the last ones stay (each holds the best epoch's weights too)."""
    keep_every: int | None = Field(None, ge=1)
    """Also save at every multiple of this many steps, and keep those besides the last ones."""
    max_gb: float = Field(20.0, gt=0)
    """Limit of all kept checkpoints of a run; the oldest go first, the last always stays."""


class Train(Section):
    epochs: int = Field(10, ge=1)
    batch: int = Field(64, ge=1)
    """Samples per step over all replicas; never changes with their number."""
    shards: int | None = Field(None, ge=1)
    """Logical workers for the life of a run. Default: batch / 32 as a power of two, at least 4."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the averaged weights that are evaluated and served instead of the last ones."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = Field(0, ge=0)
    exact: bool = True
    """Same bytes for any number of replicas. False drops the promise for speed, and says so."""
    threads: int = Field(1, ge=1)
    """Threads per replica; part of what the result depends on, so it is set, not guessed."""
    digest_every: int = Field(50, ge=1)
    """Steps between two links of the chained digest that replicas compare."""
    early_stop: EarlyStop | None = None
    checkpoint: Checkpoint = Checkpoint()
    tensorboard: bool = False
    """Also write each epoch's metrics for TensorBoard, in the run's folder."""
    profile: int | None = Field(None, ge=1)
    """Record this many steps of replica 0 with torch.profiler, into the run's folder."""

    @property
    def n_shards(self) -> int:
        """The shards of a run with these settings."""
        if self.shards is not None:
            return self.shards
        return max(4, 1 << ((self.batch // 32) or 1).bit_length() - 1)

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        if self.batch % self.n_shards:
            below = self.batch - self.batch % self.n_shards
            options = " or ".join(str(b) for b in (below, below + self.n_shards) if b > 0)
            raise ValueError(
                f"batch must be a multiple of shards, but got batch {self.batch} and "
                f"{self.n_shards} shards: set batch to {options}, or shards to a divisor of it"
            )
        return self


class Workers(Section):
    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    spot: bool = False
    """Live replicas on spot nodes only, the first ``min`` on all others, by Ray's node label
    ``ray.io/market-type``: a spot node that is taken away never takes the group with it."""
    mode: Literal["live", "restart"] | None = None
    """``live``: the first ``min`` replicas are Ray Train's group, up to ``max`` more come and go
    while the others train on. ``restart``: Ray Train's group itself is resized, by starting all of
    it again from a checkpoint. Default: live, on GPUs restart."""

    @property
    def live(self) -> bool:
        return self.mode == "live" or (self.mode is None and not self.gpus)

    @model_validator(mode="after")
    def _range(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min <= max must hold, but got {self.min} and {self.max}")
        if self.mode == "live" and self.gpus:
            raise ValueError(
                f"mode: live exchanges gradients over gloo, but got gpus: {self.gpus:g}: leave "
                "mode out, or set it to restart"
            )
        if self.spot and not self.live:
            raise ValueError(
                "spot: true is for live replicas, but mode is restart, where all workers are one "
                "group: leave spot out, or set mode: live"
            )
        return self


class Distribution(Section):
    """Exactly one of these; ranges include both ends."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None
    randint: tuple[int, int] | None = None
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = list(self._given())
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(type(self).model_fields)} must be given, got {given}"
            )
        if self.choice is not None and len(self.choice) == 0:
            raise ValueError("choice must list at least one value")
        if self.choice is None:
            low, high, *step = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"low < high must hold, but got {low} and {high}")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform must start above 0, but got {low}")
            if step and step[0] <= 0:
                raise ValueError(f"the step of quniform must be above 0, but got {step[0]}")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        """The one that is given; the others would only clutter the file."""
        return {n: v for n in type(self).model_fields if (v := getattr(self, n)) is not None}

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that show whether a whole distribution is allowed: its ends, or each choice."""
        if self.choice is not None:
            return self.choice
        (limits,) = self._given().values()
        return tuple(limits[:2])


class Budget(Section):
    minutes: float = Field(gt=0)
    """No trial starts, and running ones are stopped, after this long."""


class Tune(Section):
    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    trials: int = Field(16, ge=1)
    parallel: int | None = Field(None, ge=1)
    """Trials at a time. Default: as many as the cluster has room for."""
    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted path of a setting -> where to look."""
    searcher: Literal["tpe", "random"] = "tpe"
    scheduler: Literal["asha", "none"] = "asha"
    """``asha`` stops a trial that is among the worse two thirds at epochs 1, 3, 9, ..."""
    seed: int = Field(0, ge=0)
    budget: Budget | None = None

    @field_validator("space")
    @classmethod
    def _paths(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        for path in space:
            if path.split(".")[0] not in ("model", "train"):
                raise ValueError(
                    f"{path!r} cannot be searched: a path starts with model. or train. (the data "
                    "are read once, for all trials)"
                )
        return space


class Gate(Section):
    metric: str = "accuracy"
    at_least: float | None = None
    at_most: float | None = None
    beats: tuple[Literal["baseline", "linear", "boosting", "champion"], ...] = ("baseline",)
    """What the version must be better than on the test split: the trivial baseline, the linear
    one, gradient boosting (for tables), the current champion (if there is one)."""


class Replicas(Section):
    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _range(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min <= max must hold, but got {self.min} and {self.max}")
        return self


class Batching(Section):
    max: int = Field(64, ge=1)
    """Rows in one forward pass at most."""
    wait_ms: float = Field(2.0, ge=0)
    """How long the first request of a batch waits for others."""


class Limits(Section):
    """What an endpoint takes; a request beyond is refused and named, never cut."""

    body_mb: float = Field(16.0, gt=0)
    """MiB of one request's body (413)."""
    decoded_mb: float = Field(256.0, gt=0)
    """MiB that the texts and images of a body unpack to (413)."""
    rows: int = Field(10_000, ge=1)
    """Rows of one request (413)."""
    queue: int = Field(256, ge=1)
    """Requests in a replica at a time, waiting or running (429)."""
    timeout_s: float = Field(60.0, gt=0)
    """For one request, from its head to its answer (408 while its body arrives, then 503)."""


class Serve(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    replicas: Replicas = Replicas()
    batch: Batching = Batching()
    limits: Limits = Limits()
    keys: str | None = None
    """File of API keys; with it every request needs one. Default: none on loopback, and
    ``lepton_keys.json`` at any other host."""


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
        if "boosting" in self.gate.beats and self.data.kind != "table":
            raise ValueError(
                "gate.beats: boosting is measured for tables only: take it out of the list"
            )
        if self.train.exact and self.workers.max > self.train.n_shards:
            raise ValueError(
                f"workers.max must be at most the number of shards, but got {self.workers.max} "
                f"workers and {self.train.n_shards} shards: set train.shards to "
                f"{1 << (self.workers.max - 1).bit_length()} or workers.max to "
                f"{self.train.n_shards}"
            )
        return self
