"""The head of a cluster loses power and starts again, with Ray's state on its disk or in a Redis
(LEPTON_GCS): an endpoint on another machine answers meanwhile, and a job goes on afterwards. `make
e2e-cluster`; prints its timeline."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_ray_up import (
    ADDRESS,
    DEADLINE_S,
    HEAD,
    V1,
    WORKERS,
    Timeline,
    alone,
    cluster_file,
    did,
    left,
    status,
)
from tests.lab import Lab, Machine, machines, wait_for

pytestmark = pytest.mark.cluster

CLIENT = "10.214.0.2"
REDIS = f"{CLIENT}:6390"
EXPERIMENT = "experiments/digits.yaml"
ONE = ["--set=workers.min=1", "--set=workers.max=1", "--set=tune=null"]
SERVED = ["--set=serve.host=0.0.0.0", "--set=serve.keys=/root/keys.json", "--set=train.epochs=6"]
TRAINED = ["train.epochs=200", "model.width=32"]
QUIET: dict[str, Any] = {
    "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
}  # fmt: skip

# Ask an endpoint until a file appears; one line for each answer: its version, or what went wrong.
ASK = """
import json, pathlib, sys, time, urllib.request
url, key, body, end, said = sys.argv[1:]
with open(said, "w", buffering=1) as file:
    while not pathlib.Path(end).exists():
        asked = urllib.request.Request(
            f"{url}/predict", body.encode(),
            {"content-type": "application/json", "authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                line = str(json.load(answer)["version"])
        except OSError as error:
            line = f"failed: {error}"
        print(line, file=file)
        time.sleep(0.1)
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    yield from machines({"client": CLIENT, "head": HEAD, "w1": WORKERS[0], "w2": WORKERS[1]})


@pytest.mark.parametrize("store", ["disk", REDIS])
def test_endpoints_and_jobs_outlive_the_head(lab: Lab, store: str) -> None:
    timeline, client, head = Timeline(), lab["client"], lab["head"]
    asks = f"lepton-ray {{}} --address {ADDRESS}"
    up = "ray up -y --no-config-cache ~/cluster.yaml"
    with ExitStack() as ends:
        if store == REDIS:
            if shutil.which("redis-server") is None:
                pytest.skip("needs redis-server (system-packages.txt)")
            run_beside(
                ends, client, f"exec redis-server --bind {CLIENT} --port 6390 --save '' "
                "--protected-mode no"
            )  # fmt: skip
        shutil.copy(lab.folder / "key", client.folder / "root/.ssh/lepton_cluster")
        cluster_file(client.folder / "root/cluster.yaml", f" LEPTON_GCS={store}")
        did(client, up, **V1)
        fetch = "ray rsync-down ~/cluster.yaml '~/.ray/auth_token' ~/.ray/auth_token"
        did(client, f"mkdir -p ~/.ray && {fetch}")
        tunnel = run_beside(ends, client, "exec ray dashboard ~/cluster.yaml")
        wait_for(lambda: client.run(asks.format("jobs list")).returncode == 0, DEADLINE_S)
        timeline.say("ray up: the head is there")

        key = json.loads(did(head, "lepton-ray keys create lab --file ~/keys.json --json"))["key"]
        did(
            client,
            asks.format(
                f"submit {EXPERIMENT} --keep --name served --no-wait {' '.join([*ONE, *SERVED])}"
            ),
        )
        logs = asks.format("jobs logs served")
        wait_for(lambda: "keep   serving" in client.run(logs).stdout, DEADLINE_S, 2.0)
        body = client.run(logs).stdout.partition(" -d '")[2].partition("'")[0]
        (replica,) = (m for m in (lab["w1"], lab["w2"]) if processes(m, "ray::ServeReplica:digits"))
        url = f"http://{replica.address}:8000"
        timeline.say(f"served: a replica on {replica.name}")
        bearer = "Authorization: Bearer "
        for address, port in ((replica.address, 8000), (replica.address, 30000), (HEAD, 8500)):
            given = [
                status(client, address, port, "/health", *headers)
                for headers in ((), (bearer + "wrong",), (bearer + key,))
            ]
            assert given == ["401", "401", "200"], (port, given)
        for port, path in ((8404, "/stats"), (9101, "/metrics")):
            assert status(client, replica.address, port, path) == "200", port

        submit = asks.format(
            f"submit {EXPERIMENT} --command train --name trained {' '.join(ONE)} "
            f"--set=train.checkpoint.every_s=1 {' '.join(f'--set={s}' for s in TRAINED)}"
        )
        said = lab.shared / "submit"
        with said.open("w") as output:
            sent = subprocess.Popen(
                client.command(submit), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        ends.callback(end, sent)
        results = lab.shared / "lepton/results/trained"
        wait_for(lambda: list(results.rglob("checkpoints/*")), DEADLINE_S)
        timeline.say("a job has its first checkpoint")

        answers, over = lab.shared / "answers", lab.shared / "over"
        (lab.shared / "ask.py").write_text(ASK)
        run_beside(
            ends, client, f"exec python /mnt/ask.py {url} {key} '{body}' /mnt/over /mnt/answers"
        )
        wait_for(lambda: answers.exists() and lines(answers) > 20, DEADLINE_S)
        before = processes(replica, "ray::ServeReplica:digits")
        head.cut_power()
        timeline.say("the head loses power")
        asked = lines(answers)
        wait_for(lambda: lines(answers) > asked + 100, DEADLINE_S)
        head.start()
        end(tunnel)
        did(client, up, **V1)
        run_beside(ends, client, "exec ray dashboard ~/cluster.yaml")
        wait_for(lambda: client.run(asks.format("jobs list")).returncode == 0, DEADLINE_S)
        timeline.say("ray up again: the head is back")

        wait_for(lambda: sent.poll() is not None, DEADLINE_S, 1.0)
        told = said.read_text()
        assert sent.returncode == 0, told
        assert "trained was lost with the head it ran on, and is sent again" in told, told
        assert len(list((results / "digits").iterdir())) == 1, "the same run"
        assert f"weights {alone(EXPERIMENT, TRAINED)[:12]}" in told, told
        timeline.say("the job went on, to the bytes of a training without losses")

        health = f"curl -s -m 10 -H 'authorization: Bearer {key}' {url}/health"
        well = {"status": "ok", "model": "digits", "version": 1}
        wait_for(lambda: json.loads(client.run(health).stdout or "{}") == well, DEADLINE_S, 1.0)
        assert processes(replica, "ray::ServeReplica:digits") == before, "the same process"
        over.touch()
        given = answers.read_text().splitlines()
        assert set(given) == {"1"}, sorted(set(given))
        timeline.say(f"all of {len(given)} requests were answered, and the endpoint follows again")

        did(client, "ray down -y ~/cluster.yaml", **V1)
        wait_for(lambda: not left(head), DEADLINE_S, 1.0)
        timeline.say("ray down: nothing runs on the head; the others wait ten minutes for it")


def run_beside(ends: ExitStack, machine: Machine, line: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(machine.command(line), **QUIET)
    ends.callback(end, process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def processes(machine: Machine, name: str) -> list[str]:
    """Id and name of the processes of an actor."""
    found = machine.run("ps -eo pid,args --no-headers").stdout.splitlines()
    return [line for line in found if name in line and "ps -eo" not in line]
