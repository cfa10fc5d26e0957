"""Hosts with addresses of their own: one that goes silent, as a machine that loses power or a cable
does, closes no socket. Only here is nobody told of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lepton_ray import data
from lepton_ray.config import with_settings
from lepton_ray.config.schema import Experiment
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train
from tests.e2e.test_elastic import STORE_BYTES, experiment

RAY = str(Path(sys.executable).with_name("ray"))
REPO = Path(__file__).parents[2]
DEADLINE_S = 600
PORT = 6379


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")
    return done.stdout


class Hosts:
    """Network namespaces on a bridge, the first one with the head of a Ray cluster and the driver.

    Nothing of them is seen from the machine's own network. All share its files.
    """

    def __init__(self, n: int) -> None:
        self.prefix = f"lepton{os.getpid()}"
        self.names = [f"{self.prefix}-{number}" for number in range(n)]
        self.switch = f"{self.prefix}-switch"
        self.addresses = [f"10.213.0.{number + 1}" for number in range(n)]
        self._folder = tempfile.TemporaryDirectory(prefix="net-", ignore_cleanup_errors=True)

    def up(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"to{number}",
               "netns", self.switch)  # fmt: skip
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", self.switch, "link", "set", f"to{number}", "master", "bridge", "up")
            if number == 0:
                where = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
            else:
                where = [f"--address={self.addresses[0]}:{PORT}", "--num-cpus=1"]
            command = self.command(
                number, RAY, "start", *where, f"--node-ip-address={address}",
                f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats",
            )  # fmt: skip
            # To no pipe: what it starts would hold that open for ever.
            subprocess.run(
                command, env=self.environment(number), check=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def command(self, number: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[number], *words]

    def environment(self, number: int) -> dict[str, str]:
        folder = f"{self._folder.name}/{number}"  # of Ray's own files, apart from the machine's
        return {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}

    def set_link(self, number: int, state: str) -> None:
        ip("-n", self.switch, "link", "set", f"to{number}", state)

    def down(self) -> None:
        here = set(ip("netns", "list").split())
        for name in [*self.names, self.switch]:
            if name not in here:
                continue
            while pids := ip("netns", "pids", name).split():
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.1)
            ip("netns", "delete", name)
        self._folder.cleanup()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """A head and three hosts of one CPU."""
    made = Hosts(4)
    try:
        made.up()
    except OSError as error:
        made.down()
        pytest.skip(f"needs network namespaces: {error}")
    try:
        yield made
    finally:
        made.down()


def asked(folder: Path) -> Experiment:
    """With pauses until a file ``over`` is there."""
    paced = experiment("mlp", "adamw", 0.04, epochs=280)
    return with_settings(paced, {"model.until": f"{folder}/over"})


def drive(folder: Path) -> None:
    """Train, and say each event on a line, with where the replicas are; runs on the head's host."""

    def say(event: dict[str, Any]) -> None:
        if event["kind"] == "start":
            actors = ray._private.state.actors().values()
            event["hosts"] = {
                a["ActorClassName"]: a["Address"]["IPAddress"]
                for a in actors
                if a["State"] == "ALIVE"
            }
            event["nodes"] = sum(node["Alive"] for node in ray.nodes())
        print(json.dumps(event), flush=True)

    ray.init(address=f"{sys.argv[2]}:{PORT}", log_to_driver=False)
    dataset = ray.put(data.load(asked(folder).data))
    done = train(
        asked(folder), dataset, folder=folder, checkpoints=f"{folder}/checkpoints", on_event=say
    )
    say({"kind": "done", "sha256": state_sha256(done.weights), "digest": done.digest})
    ray.shutdown()


class Training:
    """The driver and what it says."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        command = hosts.command(
            0, sys.executable, "-m", "tests.e2e.test_network", str(folder), hosts.addresses[0]
        )
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            command, cwd=REPO, env=hosts.environment(0), text=True,
            stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        self._deadline = threading.Timer(DEADLINE_S, self._process.kill)
        self._deadline.start()

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event for which it holds."""
        assert self._process.stdout
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue  # Ray's own words
            self.events.append(json.loads(line))
            if holds(self.events[-1]):
                return self.events[-1]
        self._errors.seek(0)
        told = {"start", "resize", "replica_lost", "replica_failed", "stuck"}
        said = [
            {k: v for k, v in e.items() if k not in ("profile", "hosts")}
            for e in self.events
            if e["kind"] in told or e is self.events[-1]
        ]
        raise AssertionError(f"never came: {said}\n{self._errors.read()[-4000:]}")

    def wait_for_start(self, replicas: int) -> dict[str, Any]:
        return self.wait_for(lambda e: e["kind"] == "start" and e["replicas"] == replicas)

    def end(self) -> None:
        self._deadline.cancel()
        self._process.kill()
        self._process.wait()
        self._errors.close()


def test_hosts_go_silent_and_come_back(hosts: Hosts, tmp_path: Path) -> None:
    """The host of a live replica, and then that of the guaranteed one."""
    training = Training(hosts, tmp_path)

    def goes_on(start: dict[str, Any]) -> None:
        training.wait_for(lambda e: e["kind"] == "progress" and e["step"] > start["step"] + 5)

    try:
        whole = training.wait_for_start(3)
        for replica in ("Actor", "RayTrainWorker"):
            goes_on(whole)
            cut = hosts.addresses.index(whole["hosts"][replica])
            hosts.set_link(cut, "down")
            without = training.wait_for_start(2)
            last = max(e["step"] for e in training.events if e["kind"] == "progress")
            assert without["step"] >= last, "the others hold the last whole step"
            assert without["nodes"] == 4, "noticed long before Ray, which takes the node for alive"
            goes_on(without)
            hosts.set_link(cut, "up")
            whole = training.wait_for_start(3)
            assert whole["step"] > without["step"]
        (tmp_path / "over").touch()
        done = training.wait_for(lambda e: e["kind"] == "done")
    finally:
        training.end()
    paced = asked(tmp_path)
    alone = Replica(with_settings(paced, {"model.pause_s": 0}), data.load(paced.data))
    for _ in alone.epochs():
        pass
    assert done["sha256"] == state_sha256(alone.state.final_weights())
    assert done["digest"] == alone.state.digest


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
