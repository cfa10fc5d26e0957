"""Ray Train with our controller."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from tensorboardX.proto.event_pb2 import Event

from lepton_ray.config.schema import Experiment
from lepton_ray.data import Dataset
from lepton_ray.errors import ClusterError, TrainingError
from lepton_ray.jobs import session
from lepton_ray.pipeline.run import Run
from lepton_ray.priority import COMPUTES
from lepton_ray.training import processor
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train
from tests import stores
from tests.ray.conftest import experiment


def test_two_workers_end_with_the_bytes_of_one_process(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    events: list[dict] = []
    niceness: dict[int, set[int]] = {}

    def listen(event: dict) -> None:
        events.append(event)
        if event["kind"] == "start":
            threads = [thread.id for thread in psutil.Process(event["pid"]).threads()]
            found = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
            niceness[found[event["pid"]]] = set(found.values())

    result = train(
        experiment(),
        reference,
        folder=tmp_path,
        checkpoints=f"{tmp_path}/checkpoints",
        on_event=listen,
    )
    own = psutil.Process().nice()
    assert niceness == {own: {own, COMPUTES}}, "who trains gives way, what keeps Ray up does not"
    alone = Replica(experiment(), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    assert result.links == alone.state.links
    assert result.history == alone.state.history
    assert [e["epoch"] for e in events if e["kind"] == "epoch"] == [1, 2, 3]
    assert next(e for e in events if e["kind"] == "start")["replicas"] == 2


def test_a_finished_training_resumes_to_its_own_end(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    """The storage is the workers' and the driver's, whatever their working folders."""
    one = experiment(workers={"min": 1, "max": 1})
    first = train(one, reference, folder=tmp_path, checkpoints=f"{tmp_path}/checkpoints")
    events: list[dict] = []
    again = train(
        one,
        reference,
        folder=tmp_path,
        checkpoints=f"{tmp_path}/checkpoints",
        on_event=events.append,
    )
    assert next(e for e in events if e["kind"] == "start")["step"] == first.steps
    assert state_sha256(again.weights) == state_sha256(first.weights)


def test_an_interrupted_training_gives_its_workers_back(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    """Also in a Ray that outlives it; raised in this thread, as Ctrl-C is."""

    def interrupt(event: dict) -> None:
        if event["kind"] == "start":
            raise KeyboardInterrupt

    long = experiment(train={"epochs": 1000, "batch": 64})
    with pytest.raises(KeyboardInterrupt):
        train(
            long,
            reference,
            folder=tmp_path,
            checkpoints=f"{tmp_path}/checkpoints",
            on_event=interrupt,
        )
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


def test_live_replicas_end_what_the_guaranteed_one_has_no_room_to_go_on_with(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    def live(pause_s: float) -> Experiment:
        return experiment(
            model={"name": "tests.nets:sleepy", "pause_s": pause_s, "inner": "cnn", "width": 4},
            workers={"min": 1, "max": 2},
            train={"epochs": 8, "batch": 64},
        )

    taking: list[Any] = []
    heard: list[tuple[float, dict]] = []

    def take_its_room(event: dict) -> None:
        heard.append((time.time(), event))
        if event["kind"] == "start" and event["replicas"] == 2 and not taking:
            holder = ray.remote(num_cpus=1)(Holder).remote()
            taking.extend([holder, holder.pid.remote()])
            give_up.start()
            os.kill(event["pid"], signal.SIGKILL)

    give_up = threading.Timer(90, lambda: ray.kill(taking[0]))
    try:
        result = train(
            live(0.05),
            reference,
            folder=tmp_path,
            checkpoints=f"{tmp_path}/checkpoints",
            on_event=take_its_room,
        )
        assert ray.get(taking[0].pid.remote())  # it has the room still
    finally:
        give_up.cancel()
        if taking:
            ray.kill(taking[0])
    alone = Replica(live(0), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    failure_heard = next(at for at, event in heard if event["kind"] == "failure")
    last_epoch_sent = max(event["at"] for _, event in heard if event["kind"] == "epoch")
    assert failure_heard < last_epoch_sent


class Holder:
    def pid(self) -> int:
        return os.getpid()


def scalars(file: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw: records of length, checksum, event, checksum."""
    content, found = file.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        content = content[16 + length :]
    return found


def test_a_run_leaves_what_was_asked_for_in_its_folder(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    asked = experiment(
        train={
            "epochs": 3,
            "batch": 64,
            "tensorboard": True,
            "profile": 2,
            "checkpoint": {"keep": 1, "keep_every": 10},
        }
    )
    done = Run(asked, "train").go()
    folder = Path(done["run"])
    steps = done["train"]["steps"]

    (file,) = (folder / "tensorboard").iterdir()
    shown = scalars(file)
    assert [step for step, _ in shown["val_loss"]] == [steps // 3, 2 * steps // 3, steps]
    last = done["train"]["metrics"]
    assert {name: values[-1][1] for name, values in shown.items()} == pytest.approx(last)

    trace = json.loads(gzip.decompress((folder / "profile.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("convolution_backward" in name for name in names)
    assert "aten::" in (folder / "profile.txt").read_text()

    kept = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").iterdir())
    assert kept == [*range(10, steps, 10), steps]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"min": 3, "max": 3}, "needs 3 CPU, .* has 2: 1 CPU are missing; lower workers.min"),
        ({"min": 1, "max": 1, "cpus": 2.5}, "needs 2.5 CPU, .* has 2: 0.5 CPU are missing"),
        ({"min": 2, "max": 2, "gpus": 1}, "needs 2 GPU, .* has 0: 2 GPU are missing"),
    ],
)
def test_a_cluster_that_is_too_small_is_told_and_not_waited_for(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=said):
        Run(experiment(workers=workers), "train").go()
    assert not (tmp_path / "lepton_results").exists()


def test_nodes_are_asked_for_their_processors(cluster: None) -> None:
    (node,) = ray.nodes()
    assert session.processors() == {processor.kind(): [node["NodeManagerAddress"]]}


def test_a_model_that_cannot_be_exact_is_not_tried_twice(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    """Where a plan on another kind of machine could not find it."""
    events: list[dict] = []
    asked = experiment(model={"name": "tests.nets:scatter"}, workers={"min": 1, "max": 1})
    with pytest.raises(TrainingError, match="replace the operation, or set train.exact: false"):
        train(
            asked,
            reference,
            folder=tmp_path,
            checkpoints=f"{tmp_path}/checkpoints",
            on_event=events.append,
        )
    assert [e["retry"] for e in events if e["kind"] == "failure"] == [False]


def test_an_exception_of_the_model_ends_the_run_with_its_traceback(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    events: list[dict] = []
    broken = experiment(model={"name": "tests.nets:explode"}, workers={"min": 1, "max": 1})
    with pytest.raises(TrainingError, match=r"nets.py.*\n.*this model cannot be trained"):
        train(
            broken,
            reference,
            folder=tmp_path,
            checkpoints=f"{tmp_path}/checkpoints",
            on_event=events.append,
        )
    verdicts = [(e["reason"], e["retry"]) for e in events if e["kind"] == "failure"]
    assert verdicts == [
        ("an exception, tried once more: RuntimeError: this model cannot be trained", True),
        ("the same exception twice at step 0", False),
    ]
