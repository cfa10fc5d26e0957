"""The model, how it is trained, and on how many workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lepton_ray.config.schema.section import OpenSection, Section


class Model(OpenSection):
    """``name`` is a built-in model, ``hf:NAME`` or ``package.module:function``; the rest are its
    arguments."""


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


class Augment(Section):
    """Random changes of training images, anew in each epoch."""

    flip: bool = False
    """Mirror half of them, left to right."""
    shift: int = Field(0, ge=0)
    """Pixels at most, up or down and left or right."""
    erase: int = Field(0, ge=0)
    """Side in pixels of a square somewhere that becomes the mean (DeVries and Taylor, "Improved
    Regularization of Convolutional Neural Networks with Cutout", 2017)."""


class Train(Section):
    epochs: int = Field(10, ge=1)
    batch: int = Field(64, ge=1)
    """Samples per step over all replicas; never changes with their number."""
    shards: int | None = Field(None, ge=1)
    """Logical workers for the life of a run. Default: batch / 32 as a power of two, at least 4."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    augment: Augment | None = None
    """For images only."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """What an error in a class costs: as much for each class in total, or by its name (others 1).
    Of labels, what it costs to miss one: as much in total as to see it where it is not.
    The metrics stay unweighted; ``evaluate.calibrate: platt`` makes probabilities of it again."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the averaged weights that are evaluated and served instead of the last ones."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Run the model through torch.compile, which on CPUs needs a C++ compiler on each machine."""
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
