"""A real Ray cluster of several nodes: replicas killed, nodes added, drained and lost, and at the
end the bytes of an undisturbed run in one process."""

from __future__ import annotations

import itertools
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
from lepton_ray.config import validate, with_settings
from lepton_ray.config.schema import Experiment
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train
from tests.elastic import MODELS, OPTIMIZERS

STORE_BYTES = 100_000_000
# All of them are made to lose and gain replicas, in less time, in tests/unit/test_exactness.py.
OFTEN = {("transformer", "adamw")}
PAIRS = [
    pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.soak)
    for pair in itertools.product(MODELS, OPTIMIZERS)
]


def experiment(
    model: str, optimizer: str, pause_s: float, *, epochs: int = 12, **workers: Any
) -> Experiment:
    inner = MODELS[model]
    return validate(
        {
            "name": "elastic",
            "data": {"kind": "image", "source": "sklearn:digits", "split": {"test": 0.5}},
            "model": {
                **inner,
                "inner": inner["name"],
                "name": "tests.nets:sleepy",
                "pause_s": pause_s,
            },
            "train": {
                "epochs": epochs,
                "batch": 64,
                "optimizer": OPTIMIZERS[optimizer],
                "schedule": {"name": "cosine"},
                "digest_every": 10,
                "checkpoint": {"every_steps": 5},
            },
            "workers": {"min": 1, "max": 3, **workers},
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
    """Does the next of its acts when training has gone on since the last one, at its size.

    Args:
        acts: (name, number of replicas for which it waits).
        over: a file it makes when the last act has changed the group: the rest needs no pauses.
    """

    def __init__(self, cluster: Cluster, acts: list[tuple[str, int]], over: Path) -> None:
        self.cluster = cluster
        self.over = over
        self.nodes = [self._node() for _ in "ab"]
        self.acts = list(acts)
        self.events: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "start":
            self.start = event
            if not self.acts:
                self.over.touch()
        if (
            self.acts
            and event["kind"] == "progress"
            and self.start["replicas"] == self.acts[0][1]
            and event["step"] >= self.start["step"] + 5
        ):
            getattr(self, self.acts.pop(0)[0])()

    def _node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def kill_first(self) -> None:
        """Replica 0."""
        os.kill(self.start["pid"], signal.SIGKILL)

    def add(self) -> None:
        self.nodes.append(self._node())

    def lose_live(self) -> None:
        lost = next(n for n in self.nodes if n.node_id == self._node_of("Actor"))
        self.nodes.remove(lost)
        self.cluster.remove_node(lost, allow_graceful=False)

    def lose(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def drain(self) -> None:
        self._drain(self.nodes.pop(0).node_id)

    def drain_live(self) -> None:
        self._drain(self._node_of("Actor"))

    def drain_guaranteed(self) -> None:
        self._drain(self._node_of("RayTrainWorker"))

    def _node_of(self, actor: str) -> str:
        return next(
            a["Address"]["NodeID"]
            for a in ray._private.state.actors().values()
            if a["ActorClassName"] == actor and a["State"] == "ALIVE"
        )

    def _drain(self, node: str) -> None:
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                "drain-node",
                "--address",
                self.cluster.address,
                "--node-id",
                node,
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
        """Steps done again after each start but the first."""
        counts, last = [], 0
        for event in self.events:
            if event["kind"] == "start" and last:
                counts.append(max(0, last - event["step"]))
            last = event.get("step", last)
        return counts


def disturbed(
    cluster: Cluster, folder: Path, acts: list[tuple[str, int]], asked: Experiment
) -> Disturber:
    """Train through the acts, and compare with a run of one process."""
    over = folder / "over"
    asked = with_settings(asked, {"model.until": str(over)})
    dataset = data.load(asked.data)
    disturber = Disturber(cluster, acts, over)
    result = train(
        asked,
        ray.put(dataset),
        folder=folder,
        checkpoints=f"{folder}/checkpoints",
        on_event=disturber,
    )
    assert disturber.acts == [], f"training ended before: {disturber.events}"
    alone = Replica(with_settings(asked, {"model.pause_s": 0}), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    assert (result.digest, result.history) == (alone.state.digest, alone.state.history)
    return disturber


@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
def test_live_replicas_are_killed_added_and_drained(
    cluster: Cluster, tmp_path: Path, model: str, optimizer: str
) -> None:
    acts = [("kill_first", 2), ("add", 2), ("drain_live", 3)]
    asked = experiment(model, optimizer, 0.04, epochs=30)
    seen = disturbed(cluster, tmp_path, acts, asked)
    assert max(seen.sizes()) == 3
    assert set(seen.redone()) == {0}, "the others hold the last whole step"
    survivors = [e["stood_still_s"] for e in seen.events if e["kind"] == "first_step"][1:]
    assert None not in survivors, "nobody started from a checkpoint"


@pytest.mark.soak  # tests/e2e/test_network.py loses hosts of both kinds, as a power cut does
def test_a_live_node_is_lost_and_the_guaranteed_one_is_drained(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The guaranteed one leaves, and comes back when there is a node."""
    acts = [("add", 2), ("lose_live", 3), ("drain_guaranteed", 2), ("add", 1)]
    seen = disturbed(cluster, tmp_path, acts, experiment("cnn", "sgd", 0.04, epochs=45))
    assert seen.sizes()[-3:] == [2, 1, 2]
    assert set(seen.redone()) == {0}


def test_a_group_that_restarts_is_killed_grown_drained_and_loses_a_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    acts = [("kill_first", 2), ("add", 2), ("drain", 3), ("lose", 2)]
    asked = experiment("cnn", "adamw", 0.04, mode="restart", epochs=40)
    seen = disturbed(cluster, tmp_path, acts, asked)
    assert seen.sizes()[:4] == [2, 2, 3, 2]
    assert seen.sizes()[-1] == 1
    killed, grown, drained, *_ = seen.redone()
    assert (grown, drained) == (0, 0), "a pause must lose no step"
    assert killed <= 5 + 1
