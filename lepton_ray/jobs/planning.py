"""The plan: everything that can be known before time is spent on the cluster."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from lepton_ray import data
from lepton_ray.config.schema import Experiment
from lepton_ray.data import decision
from lepton_ray.data.dataset import Dataset
from lepton_ray.data.hands import Hands, Own
from lepton_ray.errors import ExperimentError, TrainingError, nearest
from lepton_ray.jobs import cluster_file, hands, prices, session
from lepton_ray.jobs.costs import Fit, fit
from lepton_ray.terminal import Silent, Terminal
from lepton_ray.tracking import store
from lepton_ray.training.loop import Replica
from lepton_ray.tuning import space

# Seconds seen on two cores; they only feed an estimate that is printed as one.
TRAIN_START_S = 14.0
TUNE_START_S = 8.0
SHARE_OF_EPOCHS = 0.45  # of all trials' epochs, that ASHA lets run
MEASURED_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen, and what was found."""

    name: str
    samples: dict[str, int]
    classes: int
    answer: str
    """What is predicted, in words."""
    data_digest: str
    notes: tuple[str, ...]
    """About the data."""
    model: str
    parameters: int
    trained: int
    """Of the parameters."""
    batch: int
    shards: int
    steps: int
    step_ms: float
    """Of one replica on this machine, median."""
    loss: float
    """Of the first step."""
    metrics: tuple[str, ...]
    cpus: float
    gpus: float
    workers: tuple[int, int]
    trials: int
    tune_s: float
    train_s: float
    profile: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        low, high = self.workers
        parts = ", ".join(f"{n:,} {part}" for part, n in self.samples.items())
        tune = f"tune {self.trials} trials about {self.tune_s:.0f} s, " if self.trials else ""
        some = f", {self.trained:,} of them trained" if self.trained < self.parameters else ""
        return "\n".join(
            [
                f"plan   {self.name}",
                f"  data     {parts}; {self.answer}; digest {self.data_digest[:12]}",
                *(f"           {note}" for note in self.notes),
                f"  model    {self.model}, {self.parameters:,} parameters{some}",
                f"  step     batch {self.batch} = {self.shards} shards x "
                f"{self.batch // self.shards}; {self.step_ms:.1f} ms for one replica here; "
                f"first loss {self.loss:.4f}",
                f"  metrics  {', '.join(self.metrics)}",
                f"  cluster  {self.cpus:g} CPUs, {self.gpus:g} GPUs; "
                f"{low if low == high else f'{low} to {high}'} workers",
                f"  time     {tune}train {self.steps:,} steps about {self.train_s:.0f} s",
            ]
        )


def make_plan(
    experiment: Experiment, *, address: str | None = None, terminal: Terminal | None = None
) -> tuple[Plan, Dataset]:
    """Check the experiment against its data, its model, the store and the cluster; try one step.

    Raises:
        InputError: the first thing that is wrong, before anything is started or written.
    """
    exact_together = experiment.train.exact and experiment.workers.max > 1
    available, kinds = _look(address, at_processors=exact_together)
    session.check_room(experiment.workers, session.possible(available), _where(address))
    session.check_alike(kinds, _where(address))
    return _make_plan(experiment, available, hands.of_session(terminal or Silent()))


def _make_plan(
    experiment: Experiment, available: Mapping[str, float], preparing: Hands
) -> tuple[Plan, Dataset]:
    store.check()
    if experiment.tune is not None:
        space.check(experiment)
    dataset = data.load(
        experiment.data, experiment.evaluate.slices, experiment.model.name, preparing
    )
    on_gpu = experiment.workers.gpus > 0 and torch.cuda.is_available()
    replica = Replica(experiment, dataset, device=torch.device("cuda" if on_gpu else "cpu"))
    decision.check(experiment.evaluate, dataset.schema)
    try:
        loss, step_s, metrics = _try(replica)
    except RuntimeError as error:
        raise TrainingError(f"the first step failed: {error}") from error
    tested = [name.removeprefix("val_") for name in metrics if name.startswith("val_")]
    if experiment.gate.metric not in tested:
        raise ExperimentError(
            experiment.name,
            [
                f"gate.metric: {experiment.gate.metric!r} is not measured, "
                f"{nearest(experiment.gate.metric, tested)}"
            ],
        )
    if experiment.tune is not None:
        space.check_metrics(experiment, metrics)
    stop = experiment.train.early_stop
    if stop is not None and stop.metric not in metrics:
        raise ExperimentError(
            experiment.name,
            [
                f"train.early_stop.metric: {stop.metric!r} is never reported, "
                f"{nearest(stop.metric, metrics)}"
            ],
        )
    workers, train = experiment.workers, experiment.train
    running = min(workers.max, max(1, int(available.get("CPU", 1) // workers.cpus)))
    shard_rounds = math.ceil(train.n_shards / running) / train.n_shards
    trials = experiment.tune.trials if experiment.tune else 0
    each = workers.cpus * (experiment.tune.workers if experiment.tune else 1)
    at_once = (experiment.tune.parallel if experiment.tune else None) or max(
        1, int(available.get("CPU", 1) // each)
    )
    plan = Plan(
        name=experiment.name,
        samples={
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        classes=len(dataset.schema.classes),
        answer=dataset.schema.answer,
        data_digest=dataset.digest,
        notes=dataset.notes,
        model=experiment.model.name,
        parameters=sum(p.numel() for p in replica.state.model.parameters()),
        trained=sum(p.numel() for p in replica.state.model.parameters() if p.requires_grad),
        batch=train.batch,
        shards=train.n_shards,
        steps=replica.total_steps,
        step_ms=step_s * 1000,
        loss=loss,
        metrics=tuple(metrics),
        cpus=available.get("CPU", 0.0),
        gpus=available.get("GPU", 0.0),
        workers=(workers.min, workers.max),
        trials=trials,
        tune_s=TUNE_START_S + trials * replica.total_steps * step_s * SHARE_OF_EPOCHS / at_once,
        train_s=TRAIN_START_S + replica.total_steps * step_s * shard_rounds,
        profile=replica.profile.to_json(),
    )
    return plan, dataset


def plan_on(
    experiment: Experiment, path: str | Path, own_prices: str | Path | None = None
) -> tuple[Plan, Fit]:
    """A plan for the cluster of a file, which need not run; the step is tried on this machine.

    Raises:
        InputError: as of `make_plan`; and when ``workers.min`` has no room on the cluster.
    """
    file = cluster_file.read(path)
    table = prices.load(own_prices)
    fit(file, experiment.workers, 0.0, table)  # before a second is spent
    room = {"CPU": 0.0, "GPU": 0.0}
    for kind in file.workers:
        cpus = float(os.cpu_count() or 1) if kind.cpus is None else kind.cpus
        room["CPU"] += kind.maximum * cpus
        room["GPU"] += kind.maximum * kind.gpus
    plan, _ = _make_plan(experiment, room, Own())
    return plan, fit(file, experiment.workers, plan.tune_s + plan.train_s, table)


def _look(
    address: str | None, *, at_processors: bool
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """The cluster's resources, of this machine when it is the embedded one; and its processors,
    where there are several nodes that may be unlike."""
    if ray.is_initialized():
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        return session.resources(), session.processors() if several and at_processors else {}
    if address or os.environ.get("RAY_ADDRESS"):
        with session.session(address):
            return _look(address, at_processors=at_processors)
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return here, {}


def _where(address: str | None) -> str:
    named = address or os.environ.get("RAY_ADDRESS")
    return f"the cluster at {named}" if named else "this machine"


def _try(replica: Replica) -> tuple[float, float, dict[str, float]]:
    """First loss, median seconds of a step, and the metrics an epoch would report."""
    replica.advance()
    metrics = replica.measure()
    seconds = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        replica.advance()
        seconds.append(time.perf_counter() - start)
    return metrics["train_loss"], statistics.median(seconds), metrics
