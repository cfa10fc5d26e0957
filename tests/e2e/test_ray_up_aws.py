"""`ray up cluster/aws.yaml` against moto, which answers as EC2, IAM and S3 do, with a machine in
namespaces for each instance: nodes come for a job, one loses power, one gets notice, the bytes of
the model are those of an undisturbed run, and the cluster serves it. `make e2e-cluster`; prints its
timeline."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_ray_up import ADDRESS, DEADLINE_S, Timeline, alone, did, left
from tests.lab import REPO, VENV, Lab, Machine, machines, wait_for

pytestmark = pytest.mark.cluster

CLIENT = "172.31.255.2"
MOTO = f"http://{CLIENT}:5555"
METADATA = f"http://{CLIENT}:8169"
FAKE = {
    "AWS_ENDPOINT_URL": MOTO, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-west-2", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
EXPERIMENT = "experiments/fashion_mnist.yaml"
ASK_S = 2.0  # a question is a process, and the machines share their processors
MODEL = [
    "train.epochs=4", "train.batch=256", "train.augment=null", "train.ema=null", "model.width=16",
    "model.blocks=2", "model.dropout=0.2",
]  # fmt: skip
SETTINGS = [
    *MODEL, "tune=null", "gate.at_least=0.85", "train.checkpoint.every_s=2",
    "workers.min=1", "workers.max=3", "workers.cpus=2", "workers.spot=true",
]  # fmt: skip

# Lines of what runs, once a second; the metadata service of all machines, told apart by address.
WATCH = """
import boto3, json, time
ec2 = boto3.client("ec2")
while True:
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    print(json.dumps([[i["InstanceId"], i["State"]["Name"], i.get("PrivateIpAddress"),
                       i.get("InstanceLifecycle", "on-demand")] for i in found]), flush=True)
    time.sleep(1)
"""
ACCOUNT = """
import boto3
ec2 = boto3.client("ec2")
ec2.import_key_pair(KeyName="lepton", PublicKeyMaterial=open("/mnt/key.pub", "rb").read())
print(ec2.describe_images()["Images"][0]["ImageId"])
"""
SERVE_METADATA = """
import json, pathlib, http.server
class Metadata(http.server.BaseHTTPRequestHandler):
    def answer(self, status, text=""):
        self.send_response(status); self.send_header("content-length", str(len(text)))
        self.end_headers(); self.wfile.write(text.encode())
    def do_PUT(self): self.answer(200, "a-token")
    def do_GET(self):
        taken = pathlib.Path("/mnt/taken").read_text().split()
        notice = {"action": "terminate", "time": "2099-01-01T00:00:00Z"}
        self.answer(*(200, json.dumps(notice)) if self.client_address[0] in taken else (404,))
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("", 8169), Metadata).serve_forever()
"""


class Cloud:
    """Lends a machine to each instance that moto starts, and takes it back when it ends."""

    def __init__(self, lab: Lab, timeline: Timeline) -> None:
        self.lab, self._timeline = lab, timeline
        self.lent: dict[str, Machine] = {}
        self.markets: dict[str, str] = {}
        self._free = [m for name, m in lab.machines.items() if name != "client"]
        self._watch = subprocess.Popen(
            lab["client"].command(f"exec python -c '{WATCH}'", **FAKE), stdout=subprocess.PIPE,
            text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self._watch.stdout
        for line in self._watch.stdout:
            for instance, state, address, market in json.loads(line):
                if state in ("pending", "running") and instance not in self.markets:
                    self.markets[instance] = market
                    machine = self._free.pop(0)
                    machine.join(address)
                    self.lent[instance] = machine
                    self._timeline.say(f"{instance} ({market}) is {machine.name} at {address}")
                elif state not in ("pending", "running") and instance in self.lent:
                    machine = self.lent.pop(instance)
                    machine.cut_power()
                    machine.wipe()
                    machine.start()
                    self._free.append(machine)
                    self._timeline.say(f"{instance} is terminated")

    def spot(self) -> list[Machine]:
        """Those that may be taken away, and run."""
        return [m for i, m in self.lent.items() if self.markets[i] == "spot" and m.runs]

    def end(self) -> None:
        self._watch.kill()
        self._watch.wait()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A client, and five machines that have no address until one is lent."""
    yield from machines({"client": CLIENT, **{f"m{number}": "" for number in range(5)}})


def prepare(lab: Lab) -> None:
    """The account's key and image, and what `aws_prepare` makes, written into the cluster file."""
    client, home = lab["client"], lab["client"].folder / "root"
    shutil.copy(lab.folder / "key", home / ".ssh/lepton_cluster")
    shutil.copy(lab.folder / "key.pub", lab.shared / "key.pub")
    shutil.copy(REPO / "cluster/aws.yaml", home / "cluster.yaml")
    did(
        client,
        "python cluster/aws_prepare.py --bucket lepton-test --ssh-from 172.31.0.0/16 "
        "--file ~/cluster.yaml",
        **FAKE,
    )
    image = did(client, f"python -c '{ACCOUNT}'", **FAKE).strip()
    raw: dict[str, Any] = yaml.safe_load((home / "cluster.yaml").read_text())
    given = " ".join(f"{name}={value}" for name, value in FAKE.items())
    raw["setup_commands"][0] += (
        f" {given} LEPTON_METADATA_URL={METADATA} LEPTON_VENV={VENV} "
        "LEPTON_RAY_OPTIONS=--object-store-memory=120000000"
    )
    raw["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/lepton_cluster"}
    raw["provider"]["use_internal_ips"] = True
    raw["idle_timeout_minutes"] = 1
    for kind in raw["available_node_types"].values():
        kind["node_config"] |= {"ImageId": image, "KeyName": "lepton"}
        if not kind["resources"]:
            kind["resources"] = {"CPU": 2}  # as these machines have
    raw["available_node_types"]["gpu_spot"]["max_workers"] = 0
    raw["available_node_types"]["cpu"]["max_workers"] = 1
    raw["available_node_types"]["cpu_spot"]["max_workers"] = 2
    (home / "cluster.yaml").write_text(yaml.safe_dump(raw))


def test_from_nothing_to_a_model_over_losses_and_back(lab: Lab) -> None:
    timeline, client = Timeline(), lab["client"]
    subprocess.run([sys.executable, "experiments/fetch.py", "fashion-mnist"], cwd=REPO, check=True)
    (lab.shared / "taken").write_text("")
    quiet: dict[str, Any] = {
        "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
    }  # fmt: skip
    server = f"{Path(sys.executable).with_name('moto_server')} -H 0.0.0.0 -p 5555"
    background = [
        subprocess.Popen(
            client.command(f"exec {server}", MOTO_EC2_LOAD_DEFAULT_AMIS="true"), **quiet
        ),
        subprocess.Popen(client.command(f"exec python -c '{SERVE_METADATA}'"), **quiet),
    ]
    cloud = None
    try:
        up = f"curl -s -o /dev/null {MOTO}/moto-api/data.json"
        wait_for(lambda: client.run(up).returncode == 0, DEADLINE_S)
        prepare(lab)
        cloud = Cloud(lab, timeline)
        did(client, "ray up -y --no-config-cache ~/cluster.yaml", **FAKE)
        timeline.say("ray up: the head is there")
        fetch = "ray rsync-down ~/cluster.yaml '~/.ray/auth_token' ~/.ray/auth_token"
        did(client, f"mkdir -p ~/.ray && {fetch}", **FAKE)
        forward = client.command("ray dashboard ~/cluster.yaml", **FAKE)
        background.append(subprocess.Popen(forward, **quiet))
        asks = f"lepton-ray {{}} --address {ADDRESS}"
        wait_for(lambda: client.run(asks.format("jobs list")).returncode == 0, DEADLINE_S)
        sent = f"submit {EXPERIMENT} --command run --keep --name lab --no-wait "
        did(client, asks.format(sent + " ".join(f"--set={s}" for s in SETTINGS)))
        timeline.say("submitted; there is no worker yet")

        wait_for(lambda: len(cloud.spot()) == 2, DEADLINE_S)
        wait_for(lambda: "3 replicas" in logs(client, asks), DEADLINE_S, ASK_S)
        timeline.say("three replicas train")
        first, second = cloud.spot()
        assert replicas(second)
        first.cut_power()
        timeline.say(f"{first.name} loses power")
        wait_for(lambda: "3 -> 2 replicas" in logs(client, asks), DEADLINE_S, ASK_S)
        (lab.shared / "taken").write_text(second.address)
        timeline.say(f"{second.name} gets notice")
        wait_for(lambda: not replicas(second), DEADLINE_S)
        assert second.runs, "it left before the machine was taken"
        timeline.say("its replica has left")
        wait_for(lambda: served_or_ended(client, asks), DEADLINE_S, ASK_S)
        said = logs(client, asks)
        assert "keep   serving" in said, said
        timeline.say("trained, promoted, served")
        there = did(client, f"ray exec ~/cluster.yaml {shlex.quote(query(said))}", **FAKE)
        answer, _ = json.JSONDecoder().raw_decode(there[there.index("{") :])  # and what ssh says
        assert answer["version"] == 1, answer
        assert abs(sum(answer["predictions"][0]["probabilities"].values()) - 1) < 1e-3, answer
        timeline.say(f"it answers: {answer['predictions'][0]['label']}")
        sha256 = alone(EXPERIMENT, MODEL)
        assert f"weights {sha256[:12]}" in said, said
        timeline.say(f"SHA-256 as of a run on one machine without losses: {sha256}")
        did(client, asks.format("jobs stop lab"))

        did(client, "ray down -y ~/cluster.yaml", **FAKE)
        wait_for(lambda: not cloud.lent, DEADLINE_S)
        timeline.say("ray down: no instance is left")
        for name, machine in lab.machines.items():
            assert name == "client" or not left(machine), name
    finally:
        if cloud is not None:
            cloud.end()
        for process in background:
            process.kill()
            process.wait()


def replicas(machine: Machine) -> list[str]:
    """The live replicas that run on a machine."""
    return [line for line in machine.processes() if line.startswith("ray::Actor")]


def served_or_ended(client: Machine, asks: str) -> bool:
    if "keep   serving" in logs(client, asks):
        return True
    status = client.run(asks.format("jobs status lab --json")).stdout
    return '"FAILED"' in status or '"STOPPED"' in status


def query(said: str) -> str:
    """The command that a run prints to ask its endpoint."""
    return next(line.strip() for line in said.splitlines() if line.strip().startswith("curl "))


def logs(client: Machine, asks: str) -> str:
    return client.run(asks.format("jobs logs lab")).stdout
