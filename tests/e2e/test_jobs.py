"""Jobs on a cluster with a token: sent once, followed, gone on with, and telling no secret."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from tests import stores
from tests.e2e.test_demo import COMMAND, DIGITS

DEADLINE_S = 600
TOKEN = "0123456789abcdef" * 4
QUICK = ["--set=train.epochs=2", "--set=workers.min=1", "--set=workers.max=1"]


def free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Cluster:
    """A head with one CPU, a job server and a token."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jobs-"))  # short, for the names of sockets
        gcs, dashboard, agent, client = free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        token = self.folder / "token"
        token.write_text(TOKEN)
        self.client = {
            **os.environ,
            "RAY_ADDRESS": self.url,
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        bin_folder = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.folder),
            "RAY_metrics_report_interval_ms": "1000",
            "LEPTON_JOBS": str(self.folder / "jobs"),
            "LEPTON_STORAGE": str(self.folder / "storage"),
            "MLFLOW_TRACKING_URI": stores.new(self.folder),
        }
        self.process = subprocess.Popen(
            [str(bin_folder / "ray"), "start", "--head", "--block", "--num-cpus=1",
             "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
             "--object-store-memory=100000000", "--disable-usage-stats"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: self.ask("jobs", "list").returncode == 0)

    def ask(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *words], cwd=self.folder, env=self.client | environment,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_S,
        )  # fmt: skip

    def status(self, name: str) -> str:
        return json.loads(self.ask("jobs", "status", name, "--json").stdout)["status"]

    def drivers(self) -> list[psutil.Process]:
        """The command lines that jobs run."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words[1:3] == ["-m", "lepton_ray"]:
                found.append(process)
        return found

    def end(self) -> None:
        everything = psutil.Process(self.process.pid).children(recursive=True)
        for process in [*everything, psutil.Process(self.process.pid)]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(everything, 30)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.end()


def test_a_job_runs_once_and_tells_no_secret(cluster: Cluster) -> None:
    """Twice the same is one job; its result and log are there, and its secret is nowhere."""
    words = ["submit", DIGITS, *QUICK, "--command", "train", "--secret", "MY_SECRET"]
    first = cluster.ask(*words, MY_SECRET="hunter2-hunter2")
    assert first.returncode == 0, first.stderr
    assert "sent to" in first.stdout
    assert "register" in first.stdout or "score " in first.stdout, first.stdout
    again = cluster.ask(*words, "--json", MY_SECRET="hunter2-hunter2")
    job = json.loads(again.stdout)
    assert (job["status"], job["command"], job["experiment"]) == ("SUCCEEDED", "train", "digits")
    listed = json.loads(cluster.ask("jobs", "list", "--json").stdout)["jobs"]
    assert [j["id"] for j in listed] == [job["id"]]
    for words in (["jobs", "logs", job["id"]], ["jobs", "logs", job["id"], "--follow"]):
        assert "score " in cluster.ask(*words).stdout
    other = cluster.ask("submit", DIGITS, "--command", "tune", "--name", job["id"])
    assert other.returncode == 2
    assert "it is another experiment: choose another --name" in other.stderr

    (run,) = (cluster.folder / "storage" / "results" / job["id"] / "digits").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    for file in cluster.folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert b"hunter2-hunter2" not in file.read_bytes(), file


def test_a_job_outlives_its_driver_its_supervisor_and_a_stop(cluster: Cluster) -> None:
    """The supervisor dies as with a head that starts again and remembers its jobs: Ray calls the
    job failed."""
    words = [
        "submit", DIGITS, "--command", "train", "--name", "killed", "--set=workers.min=1",
        "--set=workers.max=1", "--set=train.epochs=60", "--set=train.checkpoint.every_s=0.5",
    ]  # fmt: skip
    log = cluster.folder / "waiting"
    with log.open("w") as file:
        waiting = subprocess.Popen(
            [COMMAND, *words], cwd=cluster.folder, env=cluster.client, stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    results = cluster.folder / "storage" / "results" / "killed"

    def saved() -> set[str]:
        return {path.name for path in results.rglob("checkpoints/*")}

    def wait_for_more() -> None:
        before = saved()
        wait_for(lambda: saved() - before)

    wait_for_more()
    assert "runs already, joined" in cluster.ask(*words, "--no-wait").stdout
    (driver,) = cluster.drivers()
    driver.send_signal(signal.SIGKILL)
    driver.wait(DEADLINE_S)
    wait_for_more()
    (supervisor,) = (
        process
        for process in psutil.Process(cluster.process.pid).children(recursive=True)
        if process.cmdline()[:1] == ["ray::JobSupervisor"]
    )
    supervisor.send_signal(signal.SIGKILL)
    said = "killed was lost with the head it ran on, and is sent again"
    wait_for(lambda: said in log.read_text() and cluster.drivers())
    wait_for_more()
    assert "is stopping" in cluster.ask("jobs", "stop", "killed").stdout
    assert waiting.wait(DEADLINE_S) == 1
    assert "the driver ended with -9, started again; 2 more" in log.read_text()
    wait_for(lambda: cluster.status("killed") != "RUNNING")
    assert cluster.status("killed") == "STOPPED"
    wait_for(lambda: not cluster.drivers())
    done = cluster.ask(*words)
    assert done.returncode == 0, done.stderr
    assert "was stopped, goes on" in done.stdout
    (run,) = (results / "digits").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "finished", "the same run"


def test_a_job_that_fails_says_so(cluster: Cluster) -> None:
    done = cluster.ask(
        "submit", DIGITS, *QUICK, "--command", "train", "--set=model.name=nets:none", "--json"
    )
    assert done.returncode == 1
    assert "failed" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobs", "status"], "jobs status needs a NAME"),
        (["jobs", "status", "nne"], "no job 'nne' at http://127.0.0.1"),
        (["jobs", "list", "--address", "ray://127.0.0.1:1"], "as http://HOST:8265"),
        (["jobs", "list", "--address", "127.0.0.1:1"], "no job server answers at"),
        (["submit", "none.yaml"], "cannot be read"),
        (["submit", DIGITS, "--name", "a b"], "but got 'a b'"),
        (["submit", DIGITS, "--secret", "NO_SUCH"], "no such variable"),
        (["submit", DIGITS, "--set=data.source=x"], "does not exist"),
    ],
)
def test_wrong_input_is_told(cluster: Cluster, words: list[str], said: str) -> None:
    done = cluster.ask(*words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert said in done.stderr


def test_no_token_and_a_wrong_one_are_told(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("f" * 64)
    for path, said in (("wrong", "is wrong"), ("none", "cannot be read")):
        done = cluster.ask("jobs", "list", RAY_AUTH_TOKEN_PATH=str(tmp_path / path))
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    done = cluster.ask("jobs", "list", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert (done.returncode, "is missing" in done.stderr) == (2, True), done.stderr


class Old(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"ray_version": "2.9.0"}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_another_ray_is_named() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run(
        [COMMAND, "jobs", "list", "--address", f"127.0.0.1:{server.server_address[1]}"],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    assert done.returncode == 2
    assert "runs Ray 2.9.0, and this is Ray 2.60.0" in done.stderr


def test_an_address_that_is_silent_is_given_up_after_ten_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        done = subprocess.run(
            [COMMAND, "jobs", "list", "--address", f"127.0.0.1:{silent.getsockname()[1]}"],
            capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
    assert done.returncode == 2
    assert "within 10 s" in done.stderr
    assert time.monotonic() - start < 120, "with the start of Python on a loaded machine"
