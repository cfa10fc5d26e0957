"""A real Ray cluster of several nodes: a worker killed, a node added, a node drained, and at the
end the bytes of an undisturbed run in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train

MODELS = {
    "mlp": {"inner": "mlp", "width": 24, "dropout": 0.1},
    "cnn": {"inner": "cnn", "width": 4, "dropout": 0.1},
    "transformer": {"inner": "tests.nets:transformer"},
}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 0.003},
}
STORE_BYTES = 100_000_000


def experiment(model: str, optimizer: str, pause_s: float) -> Experiment:
    return validate(
        {
            "name": "elastic",
            "data": {"kind": "image", "source": "sklearn:digits", "split": {"test": 0.5}},
            "model": {"name": "tests.nets:sleepy", "pause_s": pause_s, **MODELS[model]},
            "train": {
                "epochs": 12,
                "batch": 64,
                "optimizer": OPTIMIZERS[optimizer],
                "schedule": {"name": "cosine"},
                "digest_every": 10,
                "checkpoint": {"every_steps": 5},
            },
            "workers": {"min": 1, "max": 3},
        }
    )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES},
    )
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


class Disturber:
    """Does the next of its acts when training has gone on since the last one."""

    def __init__(self, cluster: Cluster, acts: list[str]) -> None:
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in "ab"]
        self.acts = list(acts)
        self.events: list[dict[str, Any]] = []
        self.replica: dict[str, Any] = {}
        self.next_step = 10

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "start":
            self.replica = event
        if event["kind"] == "first_step" and event["step"] > 1:
            self.next_step = event["step"] + 5
        if self.acts and event.get("step", 0) >= self.next_step and event["kind"] == "progress":
            self.next_step = sys.maxsize  # until the group has started again
            getattr(self, self.acts.pop(0))()

    def kill(self) -> None:
        os.kill(self.replica["pid"], signal.SIGKILL)

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))

    def lose(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def drain(self) -> None:
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                "drain-node",
                "--address",
                self.cluster.address,
                "--node-id",
                self.nodes[0].node_id,
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "spot",
                "--deadline-remaining-seconds",
                "300",
            ],
            check=True,
            capture_output=True,
        )

    def sizes(self) -> list[int]:
        return [e["replicas"] for e in self.events if e["kind"] == "start"]

    def redone(self) -> list[int]:
        """Steps done again after each restart."""
        counts, last = [], 0
        for event in self.events:
            if event["kind"] == "start" and last:
                counts.append(max(0, last - event["step"]))
            last = event.get("step", last)
        return counts


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_killed_grown_and_drained(
    cluster: Cluster, tmp_path: Path, model: str, optimizer: str
) -> None:
    dataset = data.load(experiment(model, optimizer, 0).data)
    disturber = Disturber(cluster, ["kill", "add", "drain"])
    result = train(
        experiment(model, optimizer, 0.04),
        ray.put(dataset),
        folder=tmp_path,
        checkpoints=f"{tmp_path}/checkpoints",
        on_event=disturber,
    )
    assert disturber.acts == [], f"training ended before: {disturber.events}"
    assert disturber.sizes() == [2, 2, 3, 2]
    killed, grown, drained = disturber.redone()
    assert (grown, drained) == (0, 0), "a pause must lose no step"
    assert killed <= 5 + 1

    alone = Replica(experiment(model, optimizer, 0), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    assert (result.digest, result.history) == (alone.state.digest, alone.state.history)


def test_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    dataset = data.load(experiment("cnn", "sgd", 0).data)
    disturber = Disturber(cluster, ["lose"])
    result = train(
        experiment("cnn", "sgd", 0.04),
        ray.put(dataset),
        folder=tmp_path,
        checkpoints=f"{tmp_path}/checkpoints",
        on_event=disturber,
    )
    assert disturber.sizes()[0] == 2
    assert disturber.sizes()[-1] == 1
    alone = Replica(experiment("cnn", "sgd", 0), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
