"""How long training stands still when the cluster changes, against Ray Train's own elastic mode.

    python benchmarks/resize.py [--case EVENT] [--quick] [--json]

Events, all to the worker of rank 0: ``kill``, its kill -9; ``lose``, its node gone; ``drain``, a
notice and 10 s later its node gone. And ``add``, a node more. Arms: ours, Ray Train at its
defaults, Ray Train tuned by hand (every interval and time-out it reads from the environment). All
run steps of the same length on the same nodes of one machine, save every 20 steps, and write a line
per step. Standing still is the longest gap between two steps after the event, less the step itself;
redone is how many step numbers came twice. A training is ended when it has gone on for a while with
other replicas than before the event, or after a limit.

Each run is appended to ``results/resize.jsonl`` and not done again: a benchmark that was stopped
goes on, one that is to be new starts with the file removed. ``--case`` runs the repeats of one
event.
``--quick`` runs each pair once, and only kill and add, and keeps nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report

EVENTS = ["kill", "lose", "drain", "add"]
ARMS = ("ours", "ray_default", "ray_tuned")
REPEATS = 3
KEPT = Path(__file__).parent / "results" / "resize.jsonl"
STEPS_S = 0.1  # of one step; long enough to write every one down
SAVE_EVERY = 20
SETTLE_S = 8.0  # of training before the event
GRACE_S = 10.0  # between a drain notice and the node's end
LIMIT_S = 180.0  # of training after the event
CALM_S = 12.0  # of steps after the last change of replicas
TUNED = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}


def ray_worker(config: dict[str, Any]) -> None:
    """What a person writes for Ray Train: DDP, a checkpoint now and then, resumed from."""
    import ray.train
    import torch
    from ray.train import Checkpoint

    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = 0
    found = ray.train.get_checkpoint()
    if found:
        with found.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=True)
        getattr(model, "module", model).load_state_dict(state["model"])
        step = state["step"]
    rank = ray.train.get_context().get_world_rank()

    def stops() -> bool:
        """Asked of all together: a worker that went on alone would wait for the others."""
        seen = torch.tensor(float(os.path.exists(config["log"] + ".stop")))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        return bool(seen > 0)

    while not stops():
        time.sleep(STEPS_S)
        loss = model(torch.randn(16, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if rank == 0:
            with open(config["log"], "a") as file:
                size = ray.train.get_context().get_world_size()
                file.write(f"{time.time()} {step} {os.getpid()} {rank} {size}\n")
        if step % config["save_every"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:  # of the model inside DDP: a worker alone has none around it
                    kept_model = getattr(model, "module", model).state_dict()
                    torch.save({"model": kept_model, "step": step}, f"{folder}/state.pt")
                kept = Checkpoint.from_directory(folder) if rank == 0 else None
                ray.train.report({"step": step}, checkpoint=kept)


def run_arm(arm: str, event: str, log: str) -> None:
    """One cluster, one training, one event; the steps are in ``log``. Runs in its own process."""
    import logging

    import ray
    from ray.cluster_utils import Cluster

    if arm == "ray_tuned":
        os.environ.update(TUNED)
    memory = 100_000_000
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory}
    )

    def node() -> Any:
        return cluster.add_node(num_cpus=1, object_store_memory=memory)

    def node_of(pid: int) -> Any:
        actors = ray._private.state.actors().values()
        there = next(a["Address"]["NodeID"] for a in actors if a["Pid"] == pid)
        return next(node for node in nodes if node.node_id == there)

    nodes = [node() for _ in range(1 if event == "add" else 2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    steps = int((LIMIT_S + SETTLE_S + GRACE_S) / STEPS_S)

    def disturb() -> None:
        while not Path(log).exists():
            time.sleep(0.1)
        time.sleep(SETTLE_S)
        pid = int(lines_of_rank_0(log)[-1][2])
        Path(f"{log}.event").write_text(str(time.time()))
        if event == "kill":
            os.kill(pid, signal.SIGKILL)
        elif event == "add":
            node()
        elif event == "lose":
            cluster.remove_node(node_of(pid), allow_graceful=False)
        else:
            drained = node_of(pid)
            drain = [Path(sys.executable).with_name("ray"), "drain-node", "--address",
                     cluster.address, "--node-id", drained.node_id, "--reason",
                     "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                     "--deadline-remaining-seconds", str(int(GRACE_S))]  # fmt: skip
            subprocess.run(drain, check=True, capture_output=True)
            time.sleep(GRACE_S)
            cluster.remove_node(drained, allow_graceful=False)
        done = time.time()
        while time.time() - done < LIMIT_S:
            if _went_on(log, done):
                Path(f"{log}.on").write_text(str(time.time()))
                break
            time.sleep(0.5)
        Path(f"{log}.stop").touch()

    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            if arm == "ours":
                train_ours(log, steps, Path(folder), workers=2, step_s=STEPS_S)
            else:
                train_ray(log, folder, workers=2, tuned=arm == "ray_tuned")

        training = threading.Thread(target=run)
        training.start()
        disturb()  # here, because Ray starts nodes from the main thread only
        training.join()
    ray.shutdown()
    cluster.shutdown()


def _went_on(log: str, event_done: float) -> bool:
    """Whether the replicas changed after the event, and training then ran for `CALM_S`."""
    started = float(Path(f"{log}.event").read_text())
    lines = lines_of_rank_0(log)
    changes = [
        float(b[0])
        for a, b in itertools.pairwise(lines)
        if float(b[0]) > started and (a[2], a[4]) != (b[2], b[4])
    ]
    return bool(changes) and float(lines[-1][0]) > max(changes[-1], event_done) + CALM_S


def train_ours(log: str, steps: int, folder: Path, *, workers: int, step_s: float) -> None:
    """Train `logged` on the cluster that Ray is connected to, one guaranteed replica."""
    import numpy as np
    import ray
    from elastic import dataset

    from lepton_ray.config import validate
    from lepton_ray.training.trainer import train

    experiment = validate(
        {
            "name": "resize",
            "data": {"kind": "image", "source": "unused"},
            "model": {"name": "resize:logged", "log": log, "step_s": step_s},
            "train": {"epochs": 1, "batch": 16, "checkpoint": {"every_steps": SAVE_EVERY}},
            "workers": {"min": 1, "max": workers},
        }
    )
    data = dataset(16)
    rows = np.zeros(steps * 16, dtype=np.int64)
    object.__setattr__(data.train, "x", data.train.x[rows])
    object.__setattr__(data.train, "y", data.train.y[rows])
    train(experiment, ray.put(data), folder=folder, checkpoints=f"{folder}/checkpoints")


def logged(input_shape: tuple[int, ...], classes: int, *, log: str, step_s: float) -> Any:
    """A small model that writes down every step a replica starts to try: time, step, process, rank,
    replicas."""
    import torch
    from torch import nn

    from lepton_ray.models.linear import linear
    from lepton_ray.training.membership import Peers
    from lepton_ray.training.step import TrainStep

    now: dict[str, Peers] = {}
    join = TrainStep.join

    def noted(self: TrainStep, peers: Peers) -> None:
        now["peers"] = peers
        join(self, peers)

    TrainStep.join = noted  # type: ignore[method-assign]

    class Logged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear(input_shape, classes)
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self.last: Any = None

        def forward(self, x: Any) -> Any:
            if self.training and now:  # not when the first step is rehearsed
                peers, step = now["peers"], int(self.step)
                if (peers, step) != self.last:  # once a try, whatever the number of shards here
                    self.last = peers, step
                    if not os.path.exists(f"{log}.stop"):
                        time.sleep(step_s)
                    with open(log, "a") as file:
                        now_s, pid = time.time(), os.getpid()
                        file.write(f"{now_s} {step} {pid} {peers.rank} {peers.size}\n")
                self.step += 1
            return self.inner(x)

    return Logged()


def train_ray(
    log: str, folder: str, *, workers: int, tuned: bool, save_every: int = SAVE_EVERY
) -> None:
    """The same by Ray Train's own elastic mode; `TUNED` has to be in the environment."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    extra = {"elastic_resize_monitor_interval_s": 1.0} if tuned else {}
    TorchTrainer(
        ray_worker,
        train_loop_config={"log": log, "save_every": save_every},
        scaling_config=ScalingConfig(num_workers=(1, workers), **extra),
        run_config=RunConfig(
            name="resize", storage_path=folder, failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


def lines_of_rank_0(log: str) -> list[list[str]]:
    """Time, step, process, rank, replicas."""
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    return [line for line in lines if line[3] == "0"]


def measure(arm: str, event: str) -> dict[str, float]:
    """Seconds without a step after the event, and steps done twice."""
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/steps"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        command = [sys.executable, __file__, "--arm", arm, event, log]
        done = subprocess.run(
            command, env=environment, timeout=LIMIT_S + 180, capture_output=True, text=True
        )
        if not Path(f"{log}.event").exists() or not Path(f"{log}.on").exists():
            raise RuntimeError(
                f"{arm} {event} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        at, until = (float(Path(f"{log}.{what}").read_text()) for what in ("event", "on"))
        lines = lines_of_rank_0(log)
    times = [float(line[0]) for line in lines]
    steps = [int(line[1]) for line in lines]
    sizes = [int(line[4]) for line in lines]
    gaps = [(b - a, a - at) for a, b in itertools.pairwise(times) if at < b < until]
    redone = sum(max(0, a + 1 - b) for a, b in itertools.pairwise(steps))
    used = next((t - at for t, s in zip(times, sizes, strict=True) if t > at and s == 2), None)
    longest, after = max(gaps)
    result = {"stood_still_s": longest - STEPS_S, "after_s": after, "redone": float(redone)}
    if event == "add" and used is not None:
        result["used_after_s"] = used
    return result


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        run_arm(*sys.argv[2:5])
        return
    parser = _report.parser(__doc__)
    parser.add_argument("--case", choices=EVENTS, help="only the repeats of this event")
    parser.add_argument("--summary", action="store_true", help="only of the runs that are kept")
    options = parser.parse_args()
    events = [options.case] if options.case else ["kill", "add"] if options.quick else EVENTS
    runs = [] if options.quick else kept()
    repeats = range(0 if options.summary else 1 if options.quick else REPEATS)
    for repeat, event, arm in itertools.product(repeats, events, ARMS):
        if repeat < len(_of(runs, event, arm)):
            continue
        runs.append({"event": event, "arm": arm, **measure(arm, event)})
        if not options.quick:
            with KEPT.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
        if not options.json:
            print(json.dumps(runs[-1]), flush=True)
    detail = summary(runs, events)
    _report.finish(figures(detail), detail)


def figures(detail: dict[str, Any]) -> dict[str, float]:
    """Of the worst of the events; none of none."""
    return {
        f"resize_vs_ray_{how}": min(d[f"{how}_over_ours"]["median"] for d in detail.values())
        for how in ("default", "tuned")
        if detail
    }


def kept() -> list[dict[str, Any]]:
    """The runs of earlier calls."""
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def summary(runs: list[dict[str, Any]], events: list[str]) -> dict[str, Any]:
    """By event: all runs, and how many times as long as ours Ray Train stands still."""
    detail: dict[str, Any] = {}
    for event in events:
        # Each arm may have one run more than the next, where the benchmark was stopped.
        whole = min(len(_of(runs, event, arm)) for arm in ARMS)
        stood = {arm: [r["stood_still_s"] for r in _of(runs, event, arm)[:whole]] for arm in ARMS}
        detail[event] = {
            "runs": {arm: _of(runs, event, arm) for arm in ARMS},
            "default_over_ours": _report.ratio(stood["ray_default"], stood["ours"]),
            "tuned_over_ours": _report.ratio(stood["ray_tuned"], stood["ours"]),
        }
    return detail


def _of(runs: list[dict[str, Any]], event: str, arm: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["event"], run["arm"]) == (event, arm)]


if __name__ == "__main__":
    main()
