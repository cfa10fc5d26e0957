"""`lepton-ray serve` under load: promotions, a replica that is killed, and two at the same time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from lepton_ray import Client, data, models
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.jobs import proxy
from lepton_ray.priority import LOOKS_AFTER
from lepton_ray.serving import package
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import endpoints, registry
from tests.e2e.test_demo import DEADLINE_S, Process
from tests.versions import register

PROMOTIONS = 4


def experiment(name: str, replicas: int) -> Experiment:
    return validate(
        {
            "name": name,
            "data": {"kind": "image", "source": "sklearn:digits", "split": {"test": 0.6}},
            "model": {"name": "cnn", "width": 4},
            "serve": {"replicas": {"min": replicas, "max": replicas}},
        }
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(folder: Path, name: str) -> tuple[Process, str]:
    port = free_port()
    process = Process(folder, "serve", f"{name}@champion", "--port", str(port))
    return process, f"http://127.0.0.1:{port}"


def ask(
    url: str, rows: list[dict[str, Any]], headers: dict[str, str] | None = None
) -> httpx.Response:
    return httpx.post(f"{url}/predict", json={"rows": rows}, headers=headers)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def processes(of: Process, name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if name in " ".join(process.info["cmdline"] or []):
                found += [process] * (os.getsid(process.pid) == of.process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


class Load:
    """Callers that ask until they are stopped, and compare each answer with its version's."""

    def __init__(self, url: str, rows: list[dict[str, Any]], expected: dict[int, Any]) -> None:
        self.versions: list[int] = []
        self.wrong: list[Any] = []
        self._url, self._rows, self._expected = url, rows, expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with Client(self._url) as client:
            while not self._stop.is_set():
                try:
                    said = client.predict(self._rows)
                    if said["predictions"] != self._expected[said["version"]]:
                        self.wrong.append(said)
                    self.versions.append(said["version"])
                except Exception as error:
                    self.wrong.append(error)

    def all_say(self, version: int) -> bool:
        return len(self.versions) > 60 and set(self.versions[-60:]) == {version}


@pytest.mark.skipif(not proxy.available(), reason="no HAProxy on this machine")
def test_two_endpoints_on_one_machine_promotions_and_a_killed_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    busy, calm = experiment("busy", 2), experiment("calm", 1)
    dataset = data.load(busy.data)
    for settings, seeds in ((busy, (1, 2)), (calm, (3,))):
        for seed in seeds:
            torch.manual_seed(seed)
            model = models.build(settings.model, dataset.preprocess.input_shape, 10)
            version = register(settings, dataset, model, tmp_path)
            if seed == seeds[0]:
                registry.promote(version, instead_of=None)
    rows = package.rows(dataset.schema, dataset.test_columns, 3)
    expected = {
        number: [a.model_dump() for a in load_model(f"busy/{number}").predict(rows)]
        for number in (1, 2)
    }
    (first, url), (second, other) = serve(tmp_path, "busy"), serve(tmp_path, "calm")
    for process in (first, second):
        process.wait_for(lambda process=process: "keep   serving" in process.text())
        assert len(processes(process, "haproxy")) >= 1
        for name in ("haproxy", "ServeReplica"):
            assert {p.nice() for p in processes(process, name)} == {psutil.Process().nice()}
        for name in ("ServeController", "ray::Follower", "DashboardAgent"):
            assert {p.nice() for p in processes(process, name)} == {LOOKS_AFTER}, name
        for name in ("monitor.py", "log_monitor.py", "dashboard.py"):
            assert processes(process, name) == [], "a Ray that nobody else looks at needs none"
    for name in ("busy", "calm"):
        wait_for(lambda name=name: endpoints.reports(name)[0].ports)
        told = {port.what: port for port in endpoints.reports(name)[0].ports}
        assert {"HAProxy's statistics", "HAProxy's counts"} <= told.keys()
        assert not told["HAProxy's statistics"].local, "Serve has no setting for its address"
    given = {"x-request-id": "r-7"}
    for answer in (httpx.get(f"{url}/health", headers=given), ask(url, rows[:1], given)):
        assert answer.headers.get_list("x-request-id") == ["r-7"]
    by_serve, by_us = httpx.get(f"{url}/health"), ask(url, rows[:1])
    assert "-" in by_serve.headers["x-request-id"]
    assert "-" not in by_us.headers["x-request-id"], "predictions go past Serve (`serving.short`)"
    with Load(url, rows, expected) as load:
        for number in range(PROMOTIONS):
            old, new = (1, 2) if number % 2 == 0 else (2, 1)
            registry.promote(registry.resolve(f"busy/{new}"), instead_of=old)
            wait_for(lambda new=new: load.all_say(new) or load.wrong)
        assert load.wrong == [], "a request failed, or was answered by another version than it says"
        replicas = {p.pid for p in processes(first, "ServeReplica:busy")}
        assert len(replicas) == 2
        os.kill(min(replicas), signal.SIGKILL)
        asked = len(load.versions)
        wait_for(lambda: len({p.pid for p in processes(first, "ServeReplica:busy")} - replicas))
        wait_for(lambda: len(load.versions) > asked + 200 or load.wrong)
    assert load.wrong == []
    assert Client(other).predict(rows)["model"] == "calm"
    for process in (first, second):
        process.process.send_signal(signal.SIGINT)
        process.end()
        assert process.left() == []
