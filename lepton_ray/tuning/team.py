"""The other replicas of a trial of several workers: actors in the trial's own placement group.

The group is taken as a whole or not at all, so that trials never wait for each other's halves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from torch._C._distributed_c10d import TCPStore

from lepton_ray.config.schema import Experiment
from lepton_ray.priority import give_way
from lepton_ray.training.loop import Replica
from lepton_ray.training.membership import Fixed

COLLECTIVE_TIMEOUT_S = 300
DEATH_S = 60  # Ray knows of a process that died at once, of a machine later


class Helper:
    """One further replica. Does what replica 0 does, an epoch at a time."""

    def __init__(self, dataset: list[Any]) -> None:
        give_way()
        self._dataset = ray.get(dataset[0])

    def meet(self, address: tuple[str, int], rank: int, size: int, gpu: bool) -> None:
        store = TCPStore(address[0], address[1], is_master=False)
        _form(store, rank, size, gpu)

    def start(self, experiment: dict[str, Any], epochs: int | None, gpu: bool) -> None:
        device = torch.device("cuda" if gpu else "cpu")
        replica = Replica(
            Experiment.model_validate(experiment),
            self._dataset,
            device=device,
            membership=Fixed(dist.group.WORLD, device=device),
            epochs=epochs,
        )
        self._epochs: Iterator[dict[str, float]] = replica.epochs()

    def epoch(self) -> None:
        next(self._epochs)


class Team:
    """Replicas 1 to ``size - 1``; replica 0 is who makes it."""

    def __init__(self, size: int, *, cpus: float, gpus: float, dataset: list[Any]) -> None:
        self._gpu = gpus > 0
        make = ray.remote(Helper).options(num_cpus=cpus, num_gpus=gpus)
        self._helpers: list[Any] = [make.remote(dataset) for _ in range(size - 1)]
        self._asked: list[Any] = []
        host = ray.util.get_node_ip_address()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        met = [
            helper.meet.remote((host, store.port), rank, size, self._gpu)
            for rank, helper in enumerate(self._helpers, 1)
        ]
        _form(store, 0, size, self._gpu)
        ray.get(met)

    def start(self, experiment: Experiment, epochs: int | None) -> list[Any]:
        """References that are there once all have begun."""
        raw = experiment.model_dump(mode="json")
        self._asked = [h.start.remote(raw, epochs, self._gpu) for h in self._helpers]
        return self._asked

    def epoch(self) -> list[Any]:
        """References that are there once all have done an epoch."""
        self._asked = [h.epoch.remote() for h in self._helpers]
        return self._asked

    def tell_death(self) -> None:
        """After a peer was lost: gloo notices a process that died before Ray does.

        Raises:
            RayActorError: when it was the process of one of the others that went.
        """
        waiting, end = self._asked, time.monotonic() + DEATH_S
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ended:
                return
            try:
                ray.get(ended)
            except RayActorError:
                raise
            except Exception:  # it has lost a peer too, or is the one that raised
                pass

    def close(self) -> None:
        """End the other replicas, which may hang where this one failed."""
        for helper in self._helpers:
            ray.kill(helper)
        if dist.is_initialized():
            dist.destroy_process_group()


def _form(store: TCPStore, rank: int, size: int, gpu: bool) -> None:
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
