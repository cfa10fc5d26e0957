"""Exact elastic training against DistributedDataParallel and against Ray Train's own elasticity.

    python benchmarks/elastic.py [--case NAME] [--quick] [--json]

- ``throughput_vs_ddp``: samples/s of two replicas over DDP with two processes on the same model,
  data, batch and threads; digest and checkpoints on. DDP runs its best: one micro-batch a process.
- ``step_overhead``: the same CNN's steps with live replicas over those of a fixed group, without a
  fault.
- ``samples_per_shard``: what small shards cost, one thread, against one batch of 128.
- ``checkpoint_stall``: share of step time lost to checkpoints every 20 steps.
- ``growth``: milliseconds and memory of a step against shards, parameters and replicas (not with
  ``--quick``). More replicas than processors share them, so there only what is added counts.
- ``resize_vs_ray_default``, ``resize_vs_ray_tuned``: from the runs that benchmarks/resize.py keeps,
  which needs minutes. How live replicas recover: benchmarks/recovery.py, benchmarks/goodput.py.

The data are random images of Fashion-MNIST's shape: the values do not change the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _report
import resize

SHAPE, CLASSES, BATCH = (1, 28, 28), 10, 256
WINDOW = 20  # steps
MODELS = {"cnn": {"name": "cnn", "width": 32}, "mlp": {"name": "mlp", "width": 256}}


def experiment(
    model: str | dict[str, Any],
    *,
    exact: bool = True,
    checkpoint_every: int | None = None,
    batch: int = BATCH,
    shards: int | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Any:
    from lepton_ray.config import validate

    return validate(
        {
            "name": "benchmark",
            "data": {"kind": "image", "source": "unused"},
            "model": MODELS[model] if isinstance(model, str) else model,
            "train": {
                "epochs": 1,
                "batch": batch,
                "shards": shards,
                "optimizer": optimizer or {"name": "sgd", "lr": 0.01, "momentum": 0.9},
                "exact": exact,
                "checkpoint": {"every_s": 1e9, "every_steps": checkpoint_every},
            },
        }
    )


def dataset(samples: int) -> Any:
    from lepton_ray.data import Column, Dataset, Samples, Schema
    from lepton_ray.data.preprocess import fit_image

    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, *SHAPE)).astype(np.float32)
    part = Samples(x=x, y=rng.integers(0, CLASSES, samples))
    column = Column(name="image", kind="image", shape=SHAPE[1:], low=0, high=255)
    return Dataset(
        schema=Schema(columns=(column,), target="label", classes=tuple(map(str, range(CLASSES)))),
        preprocess=fit_image(column, x[:8, 0], normalize=True),
        train=part,
        validation=Samples(x=x[:256], y=part.y[:256]),
        test=Samples(x=x[:256], y=part.y[:256]),
        test_columns={},
        digest="",
    )


def _ours(rank: int, size: int, store: str, folder: str, model: str, exact: bool, every: int | None,
          live: Any, warm: int, steps: int, pipe: Any) -> None:  # fmt: skip
    """Sends the seconds of each step after the warm ones.

    Args:
        live: address and secret of a coordinator; None for a fixed group.
    """
    import torch
    import torch.distributed as dist

    from lepton_ray.training.checkpoint import CheckpointFolder
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import Fixed, Membership
    from lepton_ray.training.membership.live import Live

    membership: Membership
    if live is None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        membership = Fixed(dist.group.WORLD)
    else:
        membership = Live(*live, id=f"replica {rank}", guaranteed=True, host="127.0.0.1")
    replica = Replica(
        experiment(model, exact=exact, checkpoint_every=every),
        dataset((warm + steps + 1) * BATCH),
        membership=membership,
        checkpoints=CheckpointFolder(folder),
    )
    pipe.send(_timed_steps(lambda number: replica.advance(), warm, steps))
    replica.peers.gather(torch.zeros(1))  # nobody leaves before all are done
    os._exit(0)


def _timed_steps(step: Callable[[int], None], warm: int, steps: int) -> list[float]:
    times = [time.perf_counter()]
    for number in range(warm + steps):
        step(number)
        times.append(time.perf_counter())
    each = [b - a for a, b in pairwise(times)]
    return each[warm:]


def _ddp(rank: int, size: int, store: str, folder: str, model: str, exact: bool, every: int | None,
         warm: int, steps: int, pipe: Any) -> None:  # fmt: skip
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from lepton_ray import models
    from lepton_ray.training import allocator, determinism

    settings = experiment(model, exact=exact)
    determinism.configure(settings.train, torch.device("cpu"))
    allocator.keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    net = DistributedDataParallel(models.build(settings.model, SHAPE, CLASSES))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    samples = dataset((warm + steps + 1) * BATCH).train
    each = BATCH // size
    order = np.random.default_rng(0).permutation(len(samples))

    def step(number: int) -> None:
        rows = order[number * BATCH + rank * each : number * BATCH + (rank + 1) * each]
        x, y = torch.from_numpy(samples.x[rows]), torch.from_numpy(samples.y[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    pipe.send(_timed_steps(step, warm, steps))
    _leave()


def _leave() -> None:
    """End at once: tearing gloo down beside DistributedDataParallel hangs now and then."""
    import torch.distributed as dist

    dist.barrier()
    os._exit(0)


def timed(target: Any, *arguments: Any) -> list[float]:
    """Seconds of each step of two processes, the slower one's."""
    return [max(steps) for steps in zip(*run_processes(target, 2, *arguments), strict=True)]


def run_processes(target: Any, size: int, *arguments: Any) -> list[Any]:
    """What each of ``size`` processes sends."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=target,
                args=(rank, size, f"{folder}/store", f"{folder}/checkpoints", *arguments, send),
            )
            process.start()
            send.close()  # or one that fails would be waited for
            processes.append(process)
            pipes.append(receive)
        sent = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
        return sent


def throughput(repeats: int, steps: int) -> dict[str, Any]:
    """Ours over DDP, for both models, with deterministic flags on and off."""
    figures = {}
    for model in MODELS:
        for exact in (True, False):
            values = _report.interleaved(
                {
                    "ours": lambda m=model, e=exact: sum(timed(_ours, m, e, 20, None, 5, steps)),
                    "ddp": lambda m=model, e=exact: sum(timed(_ddp, m, e, None, 5, steps)),
                },
                repeats,
            )
            figures[f"{model}{'' if exact else '_flags_off'}"] = _report.ratio(
                values["ddp"], values["ours"]
            )
    return figures


def step_overhead(repeats: int, steps: int) -> dict[str, Any]:
    """Live replicas over a fixed group, both undisturbed."""
    from lepton_ray.training.membership.coordinator import Coordinator

    secret = b"of this benchmark"

    def live() -> float:
        coordinator = Coordinator("127.0.0.1", secret, minimum=2)
        try:
            meeting = (coordinator.address, secret)
            return sum(timed(_ours, "cnn", True, None, meeting, 5, steps))
        finally:
            coordinator.close()

    values = _report.interleaved(
        {"live": live, "fixed": lambda: sum(timed(_ours, "cnn", True, None, None, 5, steps))},
        repeats,
    )
    step_ms = 1e3 * statistics.median(values["fixed"]) / steps
    return {**_report.ratio(values["live"], values["fixed"]), "fixed_step_ms": step_ms}


def checkpoint_stall(pairs: int) -> dict[str, Any]:
    """Share of time lost to a checkpoint every 20 steps.

    One training saves every 40 steps; the 20 steps from a checkpoint on (the copy, and the thread
    that writes it) stand beside the 20 after them, which have none.
    """
    seconds = timed(_ours, "cnn", True, 2 * WINDOW, None, WINDOW - 1, 2 * WINDOW * pairs)
    windows = [sum(seconds[at : at + WINDOW]) for at in range(0, len(seconds), WINDOW)]
    figures = _report.ratio(windows[0::2], windows[1::2])
    return {k: v if k == "repeats" else v - 1 for k, v in figures.items()}


def samples_per_shard(repeats: int) -> dict[str, Any]:
    """Samples/s of forward and backward at a shard's size over those at 128, one thread."""
    import torch

    from lepton_ray import models
    from lepton_ray.config.schema import Model

    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name, settings in MODELS.items():
        net = models.build(Model(**settings), SHAPE, CLASSES)
        sizes = (4, 8, 16, 32, 64, 128)
        batches = {n: (torch.randn(n, *SHAPE), torch.randint(0, CLASSES, (n,))) for n in sizes}

        def rate(size: int) -> float:
            x, y = batches[size]  # noqa: B023 - called within this iteration
            rounds = 512 // size
            start = time.perf_counter()
            for _ in range(rounds):
                net.zero_grad(set_to_none=True)  # noqa: B023
                torch.nn.functional.cross_entropy(net(x), y).backward()  # noqa: B023
            return 512 / (time.perf_counter() - start)

        for size in sizes:
            rate(size)
        rates = _report.interleaved({str(s): lambda s=s: rate(s) for s in sizes}, repeats)
        figures[name] = {
            size: statistics.median(values) / statistics.median(rates["128"])
            for size, values in rates.items()
        }
    return figures


def _growing(rank: int, size: int, store: str, folder: str, settings: dict[str, Any],
             steps: int, pipe: Any) -> None:  # fmt: skip
    """Sends the median step and the memory that model, optimizer and steps took."""
    import torch.distributed as dist

    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import Fixed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    asked = experiment(**settings)
    data = dataset((steps + 6) * asked.train.batch)
    before = _resident_mb()
    replica = Replica(asked, data, membership=Fixed(dist.group.WORLD if size > 1 else None))
    times = _timed_steps(lambda number: replica.advance(), 5, steps)
    pipe.send({"ms": 1e3 * statistics.median(times), "added_mb": _resident_mb() - before})
    _leave()


def _resident_mb() -> float:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) / 1024


def growth() -> dict[str, Any]:
    """Milliseconds of a step, and the largest replica's memory, along three axes."""

    def point(size: int, **settings: Any) -> dict[str, float]:
        sent = run_processes(_growing, size, settings, 30)
        return {name: max(s[name] for s in sent) for name in sent[0]}

    small = {"name": "mlp", "width": 64}
    return {
        "shards, 32 samples each, 1 replica": {
            str(s): point(1, model="mlp", shards=s, batch=32 * s) for s in (4, 8, 16, 32)
        },
        "width of the MLP, 8 shards of 8, 2 replicas": {
            str(w): point(2, model={"name": "mlp", "width": w}, shards=8, batch=64)
            for w in (128, 256, 512, 1024)
        },
        "replicas, 16 shards of 1, width 64": {
            str(p): point(p, model=small, shards=16, batch=16) for p in (1, 2, 4, 8)
        },
    }


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "throughput_vs_ddp": lambda quick: throughput(3 if quick else 7, 60 if quick else 150),
    "step_overhead": lambda quick: step_overhead(3 if quick else 7, 60 if quick else 150),
    "checkpoint_stall": lambda quick: checkpoint_stall(6 if quick else 30),
    "samples_per_shard": lambda quick: samples_per_shard(5 if quick else 15),
    "growth": lambda quick: {} if quick else growth(),
}


def main() -> None:
    parser = _report.parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    detail: dict[str, Any] = {"cpus": os.cpu_count()}
    for name in [options.case] if options.case else CASES:
        detail[name] = CASES[name](options.quick)
        if not options.json:
            print(name, json.dumps(detail[name]), flush=True)
    if not options.case:
        detail["resize"] = resize.summary(resize.kept(), resize.EVENTS)
    figures = {
        "throughput_vs_ddp": detail.get("throughput_vs_ddp", {}).get("cnn", {}).get("median"),
        "step_overhead": detail.get("step_overhead", {}).get("median"),
        "checkpoint_stall": detail.get("checkpoint_stall", {}).get("median"),
        **resize.figures(detail.get("resize", {})),
    }
    _report.finish({name: value for name, value in figures.items() if value is not None}, detail)


if __name__ == "__main__":
    main()
