"""Train one experiment on a Ray cluster, with Ray Train as the worker group."""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from torch import Tensor

from lepton_ray import storage
from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import LeptonRayError, TrainingError
from lepton_ray.priority import give_way
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.controller import (
    Backend,
    LiveReplicas,
    Trainer,
    pause_requested,
)
from lepton_ray.training.crew import ReplicaError
from lepton_ray.training.elasticity import SPOT
from lepton_ray.training.failures import replica_error
from lepton_ray.training.loop import Replica
from lepton_ray.training.membership import (
    PAUSE_S,
    DoubtError,
    Fixed,
    LeftError,
    LostPeerError,
    Membership,
    OutvotedError,
)
from lepton_ray.training.membership.live import Live

logger = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]
COLLECTIVE_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    weights: dict[str, Tensor]
    """The weights that are evaluated and served, by name."""
    history: list[dict[str, float]]
    """What each epoch measured."""
    links: list[tuple[int, str]]
    """The chained digest: (step, link)."""
    steps: int
    profile: dict[str, Any]

    @property
    def digest(self) -> str:
        """Last link of the chained digest; "" where training stopped before the first."""
        return self.links[-1][1] if self.links else ""


def train(
    experiment: Experiment,
    dataset: ray.ObjectRef[Dataset],
    *,
    folder: Path,
    checkpoints: str,
    epochs: int | None = None,
    on_event: OnEvent = lambda event: None,
) -> TrainResult:
    """Train over ``workers.min`` to ``workers.max`` workers; resumes from ``checkpoints``.

    Args:
        dataset: reference to a `Dataset` in the object store.
        folder: for Ray Train's own files.
        checkpoints: folder or URI that every worker reaches.
        epochs: where to stop, if before ``train.epochs``.
        on_event: called in this thread with what replica 0 reports.

    Raises:
        TrainingError: with the traceback of the training function.
    """
    workers = experiment.workers
    folder = folder.resolve()  # Ray Train's workers have working folders of their own
    if not storage.is_uri(checkpoints):
        checkpoints = str(Path(checkpoints).resolve())
    controller_name = f"lepton_ray-{uuid.uuid4().hex}"
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    size: Any = workers.min if workers.live else (workers.min, workers.max)
    config = {
        "experiment": experiment.model_dump(mode="json"),
        "dataset": [dataset],  # a bare reference would be resolved and copied into the config
        "checkpoints": checkpoints,
        "epochs": epochs,
        "controller": controller_name,
    }
    live = LiveReplicas(
        minimum=workers.min,
        size=workers.max - workers.min,
        each=resources,
        labels=SPOT if workers.spot else {},
        work=_work,
        config=config,
    )
    trainer = Trainer(
        _work,
        controller_name=controller_name,
        live=live if workers.live else None,
        on_event=on_event,
        train_loop_config=config,
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # of Ray Train, typed as of Ray Air
            num_workers=size,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
            label_selector={name: f"!{value}" for name, value in SPOT.items()}
            if workers.spot
            else None,
        ),
        torch_config=Backend(timeout_s=COLLECTIVE_TIMEOUT_S, live=workers.live),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(folder),
        ),
    )
    try:
        result: Any = trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise TrainingError(_explain(error)) from error
    value = result.return_value
    return TrainResult(
        weights={name: torch.from_numpy(array.copy()) for name, array in value["weights"].items()},
        history=value["history"],
        links=value["links"],
        steps=value["steps"],
        profile=value["profile"],
    )


def _work(config: dict[str, Any]) -> dict[str, Any] | None:
    """What one Ray Train worker does, or one live replica (``config["live"]`` is its name)."""
    give_way()
    controller: Any = ray.get_actor(config["controller"])
    experiment = Experiment.model_validate(config["experiment"])
    gpu = experiment.workers.gpus > 0
    device = ray.train.torch.get_device() if gpu else torch.device("cpu")
    rank = None if "live" in config else ray.train.get_context().get_world_rank()
    membership: Membership
    if experiment.workers.live:
        name = config["live"] if rank is None else f"guaranteed {rank}"
        address, secret = ray.get(controller.meeting_point.remote())
        membership = Live(
            address,
            secret,
            id=f"{name}@{os.getpid()}",  # another process may still pass for its predecessor
            guaranteed=rank is not None,
            host=ray.util.get_node_ip_address(),
            node=ray.get_runtime_context().get_node_id(),
            should_leave=pause_requested.is_set,
        )
    else:
        membership = Fixed(
            dist.group.WORLD if dist.is_initialized() else None,
            device=device,
            should_pause=pause_requested.is_set,
        )
    replica: Replica | None = None
    try:
        replica = Replica(
            experiment,
            ray.get(config["dataset"][0]),
            device=device,
            membership=membership,
            checkpoints=CheckpointFolder(
                config["checkpoints"],
                keep=experiment.train.checkpoint.keep,
                keep_every=experiment.train.checkpoint.keep_every,
                max_bytes=experiment.train.checkpoint.max_gb * 1e9,
            ),
            epochs=config["epochs"],
            report=lambda event: controller.put.remote({**event, "at": time.time(), "rank": rank}),
        )
        # Ray's collections look through all that torch has made: half a second, in which every
        # replica waits for this one.
        gc.freeze()
        for _ in replica.epochs():
            pass
    except LeftError:
        if rank is not None:
            time.sleep(PAUSE_S)  # ended meanwhile
        raise
    except Exception as error:
        if rank is None and isinstance(error, DoubtError):
            raise LeftError from error  # it comes again
        text = "".join(traceback.format_exception(error))
        raise ReplicaError(
            replica.state.step if replica is not None else 0,
            text,
            isinstance(error, LostPeerError | DoubtError),
            # A worker that was outvoted is replaced; a live replica may stand on the same machine.
            isinstance(error, LeptonRayError)
            and (rank is None or not isinstance(error, OutvotedError)),
        ) from None
    if rank != 0:
        return None
    return {
        "weights": {name: t.numpy() for name, t in replica.state.final_weights().items()},
        "history": replica.state.history,
        "links": replica.state.links,
        "steps": replica.state.step,
        "profile": replica.profile.to_json(),
    }


def _explain(error: Exception) -> str:
    """The first worker's own error, without Ray's frames around it."""
    if isinstance(error, WorkerGroupError):
        failures = sorted(error.worker_failures.items())
        raised = [(rank, replica_error(cause)) for rank, cause in failures]
        own = [(rank, cause) for rank, cause in raised if cause and not cause.connection]
        rank, cause = (own or failures)[0]
        return f"worker {rank} failed: {cause}"
    return "".join(traceback.format_exception_only(error)).strip()
