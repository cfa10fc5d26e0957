"""Time from sending a job to its first step, against ``ray job submit`` of a bare Ray Train script.

    python benchmarks/submitting.py [--quick] [--json]

One head of one CPU and a worker node of one CPU, with a job server and a token. Ours is
``lepton-ray submit --command train`` of an experiment: it packs and sends, and on the head the
driver plans, opens MLflow and starts one replica. Theirs sends a folder with a script that trains
the same network on the same data with Ray Train's ``TorchTrainer`` on one worker. Both write the
time of their first step on the training data.

``submit_to_first_step_over_ray``: ours over theirs; less is better.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import _report

LIMIT_S = 300
TOKEN = "0123456789abcdef" * 4
BIN = Path(sys.executable).parent
EXPERIMENT = """
name: first-step
data: {{kind: image, source: "sklearn:digits"}}
model: {{name: "noting:network", log: {log}}}
train: {{epochs: 1, batch: 64}}
storage: {storage}
"""
NETWORK = '''
import time
from pathlib import Path
import ray
from torch import nn
from lepton_ray.training.step import TrainStep

class Noting(nn.Module):
    """Writes when training first calls it: in an actor of Ray, where the plan, which tries a step,
    is not, and after joining, where a step is rehearsed before."""
    def __init__(self, log):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.log = log
    def forward(self, x):
        actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id()
        if self.training and joined and actor and not Path(self.log).exists():
            Path(self.log).write_text(str(time.time()))
        return self.layers(x)

joined = []
join = TrainStep.join
def noted(self, peers):
    join(self, peers)
    joined.append(True)
TrainStep.join = noted

def network(input_shape, classes, *, log):
    return Noting(log)
'''
SCRIPT = """
import sys, time
from pathlib import Path
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def work(config):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(x, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    model = ray.train.torch.prepare_model(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters())
    for images, labels in loader:
        if not Path(config["log"]).exists():
            Path(config["log"]).write_text(str(time.time()))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

TorchTrainer(work, train_loop_config={"log": sys.argv[1]},
             scaling_config=ScalingConfig(num_workers=1),
             run_config=RunConfig(storage_path=sys.argv[2])).fit()
"""


class Cluster:
    """A head and one more node, each a process of its own; ended with the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        token = folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        gcs, dashboard, agent, client, agent2 = _free_ports(5)
        self.url = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(folder),
            "LEPTON_JOBS": str(folder / "jobs"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        self.client = self.environment | {"RAY_ADDRESS": self.url}
        common = ["--block", "--num-cpus=1", "--object-store-memory=100000000"]
        common += ["--node-ip-address=127.0.0.1"]
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}"]
        ports += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        self._start("--head", *ports, "--disable-usage-stats", *common)
        self.wait(lambda: self.ask("jobs", "list").returncode == 0, "the job server")
        port = f"--dashboard-agent-listen-port={agent2}"
        self._start(f"--address=127.0.0.1:{gcs}", port, *common)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            process.wait()

    def _start(self, *words: str) -> None:
        self._processes.append(
            subprocess.Popen(
                [BIN / "ray", "start", *words],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def ask(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "lepton-ray", *words], cwd=cwd or self._folder, env=self.client,
            capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"{what} never came")
            time.sleep(0.05)


def _free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def first_step_s(cluster: Cluster, arm: str) -> float:
    """Seconds from the call to the first step; returns when the job is over."""
    with tempfile.TemporaryDirectory(prefix="sent-") as scratch:
        folder, log = Path(scratch), Path(scratch) / "log"
        sent = folder / "sent"
        sent.mkdir()
        if arm == "ours":
            text = EXPERIMENT.format(log=log, storage=folder / "results")
            (sent / "first.yaml").write_text(text)
            (sent / "noting.py").write_text(NETWORK)
            command = [BIN / "lepton-ray", "submit", "first.yaml", "--command", "train"]
        else:
            (sent / "script.py").write_text(SCRIPT)
            command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--",
                       "python", "script.py", str(log), str(folder / "results")]  # fmt: skip
        began = time.time()
        done = subprocess.run(
            command, cwd=sent, env=cluster.client, capture_output=True, text=True, timeout=LIMIT_S
        )
        if done.returncode or not log.exists():
            raise RuntimeError(f"{arm} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return float(log.read_text()) - began


def main() -> None:
    options = _report.parser(__doc__).parse_args()
    # Short: the names of Ray's sockets are in it.
    with tempfile.TemporaryDirectory(prefix="sub-") as folder, Cluster(Path(folder)) as cluster:
        arms = {arm: lambda arm=arm: first_step_s(cluster, arm) for arm in ("ours", "ray")}
        for run in arms.values():  # what only the first job of a cluster pays
            run()
        seconds = _report.interleaved(arms, 1 if options.quick else 5)
    ratio = _report.ratio(seconds["ours"], seconds["ray"])
    if not options.json:
        for arm, each in seconds.items():
            print(f"{arm}: {', '.join(f'{s:.1f}' for s in each)} s to the first step")
    detail = {"submit_to_first_step_over_ray": ratio | {f"{a}_s": s for a, s in seconds.items()}}
    _report.finish({"submit_to_first_step_over_ray": ratio["median"]}, detail)


if __name__ == "__main__":
    main()
