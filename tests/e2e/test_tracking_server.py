"""The MLflow server of a cluster's head: who gets in, and what outlives its machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lepton_ray.tracking import store
from lepton_ray.tracking.store import Tracker

DEADLINE_S = 240
PASSWORD = "a" * 40


class Head:
    """A head's disk and its server."""

    def __init__(
        self, root: Path, name: str, password: str = PASSWORD, port: int | None = None
    ) -> None:
        self.folder = root / name
        self.folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        (self.folder / "key").write_text("k" * 40)
        self.password = password
        self.log = (self.folder / "log").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "lepton_ray.jobs.node.tracking", "--host", "127.0.0.1",
                "--port", str(self.port), "--folder", str(self.folder / "mlflow"),
                "--key", str(self.folder / "key"), "--every-s", "2",
            ],
            env={
                **os.environ,
                "LEPTON_STORAGE": str(root / "storage"),
                "MLFLOW_TRACKING_USERNAME": "admin",
                "MLFLOW_TRACKING_PASSWORD": password,
            },
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + DEADLINE_S
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.said()
                self.end(signal.SIGKILL)
                raise AssertionError(said)
            time.sleep(0.2)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def asked(self, password: str | None) -> int:
        auth = ("admin", password) if password is not None else None
        path = "/api/2.0/mlflow/experiments/search?max_results=1"
        return httpx.get(self.url + path, auth=auth).status_code

    def end(self, how: signal.Signals) -> int:
        """The exit code; of a power cut, the whole group's."""
        pid = self.process.pid
        if how == signal.SIGKILL and self.process.poll() is None:
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.killpg(int(child), how)
        self.process.send_signal(how)
        code = self.process.wait(DEADLINE_S)
        self.log.close()
        return code


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_registered_outlives_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """At a shutdown nothing is lost; at a power cut what was recorded since the last copy."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    head = Head(tmp_path, "first")
    client = MlflowClient(head.url)
    run = client.create_run(client.create_experiment("x")).info.run_id
    client.log_metric(run, "loss", 0.5)
    client.log_text(run, "some weights", "model.txt")
    client.create_registered_model("digits")
    source = f"{client.get_run(run).info.artifact_uri}/model.txt"
    client.create_model_version("digits", source, run)
    client.set_registered_model_alias("digits", "champion", "1")
    if how == signal.SIGKILL:
        copy = tmp_path / "storage" / "mlflow" / "backup" / "mlflow.db.1.sha256"
        first = copy.read_text() if copy.exists() else ""
        deadline = time.monotonic() + DEADLINE_S
        client.log_metric(run, "loss", 0.25, step=1)
        while not copy.exists() or copy.read_text() == first:
            assert time.monotonic() < deadline
            client.log_metric(run, "beat", time.time())
            time.sleep(0.2)
    assert (head.asked(PASSWORD), head.asked("wrong"), head.asked(None)) == (200, 401, 401)
    assert head.end(how) == (0 if how == signal.SIGTERM else -9), "and it leaves nothing behind"
    with pytest.raises(httpx.TransportError):
        head.asked(None)

    new_password = "b" * 40  # a new head makes its own
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", new_password)
    again = Head(tmp_path, "second", new_password)
    try:
        assert (again.asked(new_password), again.asked(PASSWORD)) == (200, 401)
        client = MlflowClient(again.url)
        assert client.get_model_version_by_alias("digits", "champion").version == "1"
        assert client.get_run(run).data.metrics["loss"] in (0.5, 0.25)
        mlflow.set_tracking_uri(again.url)
        assert mlflow.artifacts.load_text(f"runs:/{run}/model.txt") == "some weights"
    finally:
        again.end(signal.SIGTERM)
    shown = again.folder / "mlflow" / "auth.ini"
    assert new_password not in shown.read_text()
    assert "NO_PERMISSIONS" in shown.read_text()


def test_metrics_of_a_time_without_mlflow_arrive_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is not held up for ever, and no number is lost."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # gives up soon, as after minutes
    monkeypatch.setattr(store, "FLUSH_S", 0.0)
    head = Head(tmp_path, "head")
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", head.url)
        tracker = Tracker("x", tmp_path)
        run = tracker.start("r")
        tracker.metrics(run, {"loss": 1.0}, 0)
        head.end(signal.SIGKILL)
        for step in range(1, 4):
            tracker.metrics(run, {"loss": 1.0 / step}, step)
        with pytest.raises(MlflowException):
            tracker.finish(run)
    finally:
        head = Head(tmp_path, "head", port=head.port)
    try:
        tracker.metrics(run, {"loss": 0.25}, 4)
        tracker.finish(run)
        history = MlflowClient(head.url).get_metric_history(run, "loss")
        assert sorted(m.step for m in history) == [0, 1, 2, 3, 4]
    finally:
        head.end(signal.SIGTERM)
