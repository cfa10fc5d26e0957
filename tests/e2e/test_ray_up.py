"""`ray up cluster/onprem.yaml` over real ssh, on machines in namespaces: from nothing to a finished
job and back to nothing. `make e2e-cluster`; prints its timeline."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lepton_ray import data
from lepton_ray.config import load
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from tests.lab import MOUNT, REPO, VENV, Lab, Machine, keygen, machines, wait_for

pytestmark = pytest.mark.cluster

HEAD, WORKERS = "10.214.0.10", ("10.214.0.11", "10.214.0.12")
ADDRESS = "http://127.0.0.1:8265"
V1 = {"RAY_UP_enable_autoscaler_v2": "0"}  # Ray 2.60's second autoscaler loses a local worker
SETTINGS = [
    "--set=train.epochs=8", "--set=workers.min=1", "--set=workers.max=2", "--set=workers.cpus=2",
    "--set=train.checkpoint.every_s=1", "--set=model.width=32",
]  # fmt: skip
DEADLINE_S = 1200


class Timeline:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:7.1f} s  {text}", flush=True)


def cluster_file(target: Path, more: str = "") -> dict[str, Any]:
    """cluster/onprem.yaml with these machines' addresses, and their environment, which is there.

    Args:
        more: settings.
    """
    raw = yaml.safe_load((REPO / "cluster/onprem.yaml").read_text())
    settings = (
        f"bash ~/lepton_ray/cluster/node.sh settings LEPTON_STORAGE={MOUNT}/lepton "
        f"LEPTON_VENV={VENV} LEPTON_RAY_OPTIONS=--object-store-memory=150000000{more}"
    )
    raw["provider"] |= {"head_ip": HEAD, "worker_ips": list(WORKERS)}
    raw["auth"]["ssh_user"] = "root"
    raw["setup_commands"][0] = raw["metadata"]["settings"] = settings
    target.write_text(yaml.safe_dump(raw))
    return raw


@pytest.fixture
def lab() -> Iterator[Lab]:
    yield from machines({"client": "10.214.0.2", "head": HEAD, "w1": WORKERS[0], "w2": WORKERS[1]})


def did(machine: Machine, line: str, **environment: str) -> str:
    done = machine.run(line, DEADLINE_S, **environment)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def alone(experiment: str, settings: list[str]) -> str:
    """SHA-256 of a training by one replica, without a cluster."""
    asked = load(REPO / experiment, settings)
    replica = Replica(asked, data.load(asked.data))
    for _ in replica.epochs():
        pass
    return state_sha256(replica.state.final_weights())


def status(machine: Machine, address: str, port: int, path: str, *headers: str) -> str:
    """HTTP status of an answer; 000 where nothing listens or it is no HTTP."""
    given = " ".join(f"-H '{header}'" for header in headers)
    line = f"curl -s -m 10 -o /dev/null -w '%{{http_code}}' {given} http://{address}:{port}{path}"
    return machine.run(line, 60).stdout[-3:]


def test_from_nothing_to_a_model_and_back(lab: Lab) -> None:
    timeline, client = Timeline(), lab["client"]
    home = client.folder / "root"
    shutil.copy(lab.folder / "key", home / ".ssh/lepton_cluster")
    cluster_file(home / "cluster.yaml")
    up = "ray up -y --no-config-cache ~/cluster.yaml"
    did(client, up, **V1)
    timeline.say("ray up: the head is there")
    token = "ray rsync-down ~/cluster.yaml '~/.ray/auth_token' ~/.ray/auth_token"
    did(client, f"mkdir -p ~/.ray && {token}")
    secret = (home / ".ray/auth_token").read_text().strip()
    assert len(secret) == 64
    forward = subprocess.Popen(
        client.command("ray dashboard ~/cluster.yaml"), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    asks = f"lepton-ray {{}} --address {ADDRESS}"
    wait_for(lambda: client.run(asks.format("jobs list")).returncode == 0, DEADLINE_S)
    timeline.say("the job server answers with the token that the head made")

    sent = did(
        client,
        asks.format(
            f"submit experiments/digits.yaml --command train --name lab --no-wait --json "
            f"{' '.join(SETTINGS)} --set=train.epochs=60"
        ),
    )
    timeline.say(f"submitted: {json.loads(sent)['id']}")
    results = lab.shared / "lepton/results/lab"
    wait_for(lambda: list(results.rglob("checkpoints/*")), DEADLINE_S)
    timeline.say("the first checkpoint is in the storage")

    check_who_gets_in(lab, secret, timeline)

    follow = did(client, asks.format("jobs logs lab --follow"))
    timeline.say("the job is over")
    assert "score " in follow, follow
    assert json.loads(did(client, asks.format("jobs status lab --json")))["status"] == "SUCCEEDED"

    logs = "".join(
        path.read_text(errors="replace")
        for name in ("head", "w1", "w2")
        for path in (lab[name].folder / "tmp").rglob("*.log")
        if path.is_file()
    )
    assert secret not in logs, "the token is in no log"
    said = did(client, asks.format("status lab --why") + " --cluster ~/cluster.yaml")
    assert "nothing is wrong" in said or "->" in said

    did(client, "ray down -y ~/cluster.yaml", **V1)
    timeline.say("ray down")
    forward.kill()
    forward.wait()
    for name in ("head", "w1", "w2"):
        wait_for(lambda name=name: not left(lab[name]), DEADLINE_S)
    timeline.say("nothing runs on any machine")
    backup = lab.shared / "lepton/mlflow/backup"
    assert list(backup.glob("mlflow.db.*.sha256")), "MLflow's database is in the storage"


def left(machine: Machine) -> list[str]:
    """What runs on a machine of ours or of Ray's."""
    return [p for p in machine.processes() if "ray" in p or "mlflow" in p]


def check_who_gets_in(lab: Lab, secret: str, timeline: Timeline) -> None:
    """The table of docs/cluster.md, asked from another machine."""
    client, bearer = lab["client"], "Authorization: Bearer "
    assert status(client, HEAD, 8265, "/api/version") == "000", "the dashboard is on loopback"
    for port, path, said in (
        (5000, "/api/2.0/mlflow/experiments/search?max_results=1", ("401", "401")),
        (52365, "/api/serve/applications/", ("401", "403")),
    ):
        wrong = "Authorization: Basic YWRtaW46d3Jvbmc=" if port == 5000 else f"{bearer}{'f' * 64}"
        assert (
            status(client, HEAD, port, path), status(client, HEAD, port, path, wrong)
        ) == said, port  # fmt: skip
    assert status(client, HEAD, 8090, "/metrics") == "200", "numbers only"
    keygen(client.folder / "root/other")
    into = "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=10"
    let_in = [
        client.run(f"{into} {key} root@{HEAD} true", 60).returncode == 0
        for key in ("", "-i ~/other", "-i ~/.ssh/lepton_cluster")
    ]
    assert let_in == [False, False, True], "ssh"
    for code in (
        f"from ray._raylet import GcsClient; GcsClient('{HEAD}:6379').check_alive([], 20)",
        f"import ray; ray.init('ray://{HEAD}:10001')",
    ):
        let_in = [
            client.run(
                f'timeout 90 python -c "{code}"', 120, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token
            ).returncode == 0
            for mode, token in (("disabled", ""), ("token", "f" * 64), ("token", secret))
        ]  # fmt: skip
        assert let_in == [False, False, True], code
    timeline.say("nobody gets in without the token or MLflow's password")
