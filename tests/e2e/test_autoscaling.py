"""Ray's own autoscaler, with nodes that are processes of this machine: replicas that wait for room
bring nodes, idle nodes go, and training runs through both to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from lepton_ray import data
from lepton_ray.config import with_settings
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.elasticity import SPOT
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train
from tests.e2e.test_elastic import STORE_BYTES, experiment

HEAD = "f" * 51 + "00000"  # by this id Ray's provider of nodes in name only knows its head,
HEAD_TYPE = "ray.head.default"  # and by this name its type
GONE_S = 120


def settings(gcs: str) -> dict[str, Any]:
    """A cluster of one head with a CPU and up to three spot nodes of one."""
    node = {"resources": {"CPU": 1, "object_store_memory": STORE_BYTES}, "node_config": {}}
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
             "worker_start_ray")  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "gcs_address": gcs,
        },
        "available_node_types": {
            HEAD_TYPE: {**node, "max_workers": 0},
            "spot": {**node, "min_workers": 0, "max_workers": 3, "labels": SPOT},
        },
        "head_node_type": HEAD_TYPE,
        **{f"{name}_commands": [] for name in empty},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def autoscaled() -> Iterator[str]:
    """Address of a cluster with an autoscaler."""
    folder = Path(tempfile.mkdtemp(prefix="scale-"))  # short, for the names of sockets
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings(address)))
    host, port = address.split(":")
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_TMPDIR": str(folder),  # so that no other Ray of this machine finds it
        "RAY_enable_autoscaler_v2": "1",
    }
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1",
         f"--node-ip-address={host}", f"--port={port}", f"--object-store-memory={STORE_BYTES}",
         f"--autoscaling-config={folder / 'cluster.yaml'}", "--include-dashboard=false",
         "--disable-usage-stats"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: reached(host, int(port)), 60)
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(address=address, log_to_driver=False)
        yield address
    finally:
        ray.shutdown()
        everything = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in everything:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(everything, 30)
        shutil.rmtree(folder, ignore_errors=True)


def reached(host: str, port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex((host, port)) == 0


def wait_for(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s"
        time.sleep(0.2)


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def test_waiting_replicas_bring_nodes_and_idle_nodes_go(autoscaled: str, tmp_path: Path) -> None:
    asked = experiment("mlp", "sgd", 0.04, epochs=60, spot=True)
    events: list[dict[str, Any]] = []
    seen: list[int] = []
    """Living nodes, each time the number changed."""

    @ray.remote(num_cpus=1, label_selector=SPOT)
    def somebody_else() -> None:
        time.sleep(2)

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        if event["kind"] == "progress" and seen[-1:] != [alive()]:
            seen.append(alive())
        if event["kind"] == "start" and event["replicas"] == 3:
            somebody_else.remote()

    dataset = data.load(asked.data)
    result = train(
        asked,
        ray.put(dataset),
        folder=tmp_path,
        checkpoints=f"{tmp_path}/checkpoints",
        on_event=on_event,
    )
    assert [e["replicas"] for e in events if e["kind"] == "start"][-1] == 3
    assert seen[-2:] == [4, 3], "somebody else's node came, and went during training"
    alone = Replica(with_settings(asked, {"model.pause_s": 0}), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    wait_for(lambda: alive() == 1, GONE_S)
