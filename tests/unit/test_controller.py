"""What the controller of a run makes of what its workers and nodes tell."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from lepton_ray.config import validate
from lepton_ray.training import controller, failures, trainer
from lepton_ray.training.controller import Controller, Scaling
from lepton_ray.training.crew import ReplicaError
from lepton_ray.training.elasticity import Failure, NodeView
from lepton_ray.training.membership import LostPeerError

ROOM_FOR_THREE = [NodeView(id="n", free={"CPU": 1.0}, ours=2, draining=False)]


class Running:
    """A controller whose group of two runs on nodes as they are given."""

    put = Controller.put

    def __init__(self, nodes: list[NodeView], monkeypatch: pytest.MonkeyPatch) -> None:
        self.crew: Any = None
        self.last_step = 0
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.asked: list[Any] = []
        self._scaling = Scaling(ScalingConfig(num_workers=(1, 3)))
        self._scaling.bind(self)
        monkeypatch.setattr(self._scaling, "_nodes", lambda: nodes)
        monkeypatch.setattr(self._scaling, "_maybe_send_resource_request", lambda: None)

    def tell(self, **event: Any) -> None:
        self._events.put(event)

    def get_worker_group(self) -> Any:
        return SimpleNamespace(execute_async=self.asked.append)

    def decide(self) -> Any:
        group = SimpleNamespace(num_workers=2)
        return self._scaling.make_decision_for_running_worker_group(group, None)

    def paused(self, rank: int | None) -> None:
        self.put({"kind": "paused", "step": 5, "rank": rank})


def test_a_resize_waits_until_the_whole_group_has_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(ROOM_FOR_THREE, monkeypatch)
    assert running.decide() == NoopDecision()
    assert running.asked == [controller._request_pause]
    running.paused(1)
    assert running.decide() == NoopDecision(), "replica 0 may still be saving"
    running.paused(None)
    assert running.decide() == NoopDecision(), "a live replica that was drained is none of it"
    running.paused(0)
    assert running.decide() == ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1})


def test_a_group_that_does_not_pause_is_resized_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = Running(ROOM_FOR_THREE, monkeypatch)
    running.decide()
    running.paused(1)
    monkeypatch.setattr(controller, "PAUSE_TIMEOUT_S", -1.0)
    assert isinstance(running.decide(), ResizeDecision)


def test_a_pause_of_an_earlier_resize_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(ROOM_FOR_THREE, monkeypatch)
    running.paused(0)
    running.paused(1)
    running.decide()
    assert running.decide() == NoopDecision()


def test_a_peer_lost_while_the_group_starts_is_no_exception_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reports the process that died, and the others, which miss it, as failed alike."""

    def start(*arguments: Any, **options: Any) -> Any:
        raise LostPeerError("a replica is gone")

    monkeypatch.setattr(trainer, "Replica", start)
    monkeypatch.setattr(ray, "get_actor", lambda name: SimpleNamespace())
    monkeypatch.setattr(ray, "get", lambda reference: None)
    context = SimpleNamespace(get_world_rank=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    experiment = validate(
        {
            "name": "starts",
            "data": {"kind": "image", "source": "unused"},
            "model": {"name": "mlp"},
            "workers": {"min": 2, "max": 3, "mode": "restart"},
        }
    )
    config = {
        "experiment": experiment.model_dump(mode="json"),
        "dataset": [None],
        "checkpoints": str(tmp_path),
        "epochs": None,
        "controller": "of this run",
    }
    with pytest.raises(ReplicaError) as raised:
        trainer._work(config)
    reported = UserExceptionWithTraceback(raised.value, "its traceback")
    error = WorkerGroupError("one of two", {1: reported})
    assert failures.failure_of(error, last_step=7) == Failure(step=7, exception="")
