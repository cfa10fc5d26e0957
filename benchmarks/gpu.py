"""Exact training on a GPU: the bytes, and what they cost.

    python benchmarks/gpu.py [--device cpu] [--quick] [--json]

- ``exact_fp32``, ``exact_bf16``: 1 where two processes that share the card (over gloo, since NCCL
  refuses two ranks on one GPU) end with the SHA-256 of one.
- ``deterministic_overhead``: seconds of a step with deterministic algorithms over those without.
- ``throughput_vs_torch``: samples/s of one replica over a plain PyTorch loop, for fp32 and bf16, of
  the CNN on random images of Fashion-MNIST's shape, batch 1024, ours as 8 shards of 128.
- ``served_vs_onnx``: rows/s of the same CNN as an endpoint's replica with ``serve.gpus`` computes
  them, in batches of 64, over ONNX Runtime on one thread of a processor.

Without a GPU it says so and ends. With ``--device cpu`` it does all of it on processors and tiny,
to show that it works: those figures say nothing about a GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _report
from elastic import CLASSES, SHAPE, dataset, run_processes

SHARDS = 8
SERVED_ROWS = 64
BATCH = {"cuda": 1024, "cpu": 64}
WIDTH = {"cuda": 32, "cpu": 4}
PRECISIONS = ("fp32", "bf16")


def experiment(precision: str, device: str, *, exact: bool = True) -> Any:
    from lepton_ray.config import validate

    return validate(
        {
            "name": "gpu",
            "data": {"kind": "image", "source": "unused"},
            "model": {"name": "cnn", "width": WIDTH[device], "dropout": 0.1},
            "train": {
                "epochs": 1,
                "batch": BATCH[device],
                "shards": SHARDS,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
                "precision": precision,
                "exact": exact,
                "digest_every": 10,
            },
        }
    )


def _replica(rank: int, size: int, store: str, folder: str, precision: str, exact: bool,
             steps: int, device: str, pipe: Any) -> None:  # fmt: skip
    """Sends the SHA-256 of the final weights and the seconds of a step."""
    import torch
    import torch.distributed as dist

    from lepton_ray.training.digest import state_sha256
    from lepton_ray.training.loop import Replica
    from lepton_ray.training.membership import Fixed

    on = torch.device(device)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    replica = Replica(
        experiment(precision, device, exact=exact),
        dataset((steps + 1) * BATCH[device]),
        device=on,
        membership=Fixed(dist.group.WORLD if size > 1 else None, device=on),
    )
    warm = steps // 5
    for _ in range(warm):
        replica.advance()
    started = _now(device)
    for _ in range(steps - warm):
        replica.advance()
    took = (_now(device) - started) / (steps - warm)
    pipe.send((state_sha256(replica.state.final_weights()), took))
    if size > 1:
        replica.peers.gather(torch.zeros(1))  # nobody leaves before all are done
    os._exit(0)


def _plain(rank: int, size: int, store: str, folder: str, precision: str, steps: int,
           device: str, pipe: Any) -> None:  # fmt: skip
    """The same by hand: one batch a step, no flags. Sends the seconds of a step."""
    import torch

    from lepton_ray import models

    settings = experiment(precision, device)
    batch = BATCH[device]
    net = models.build(settings.model, SHAPE, CLASSES).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    samples = dataset((steps + 1) * batch).train

    def step(number: int) -> None:
        rows = slice(number * batch, (number + 1) * batch)
        x, y = torch.from_numpy(samples.x[rows]), torch.from_numpy(samples.y[rows])
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(net(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()

    warm = steps // 5
    for number in range(warm):
        step(number)
    started = _now(device)
    for number in range(warm, steps):
        step(number)
    pipe.send((_now(device) - started) / (steps - warm))


def _now(device: str) -> float:
    """When all that was asked of the device is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(device: str, repeats: int, steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and detail."""

    def ours(precision: str, size: int = 1, exact: bool = True) -> tuple[str, float]:
        sent = run_processes(_replica, size, precision, exact, steps, device)
        assert len({sha256 for sha256, _ in sent}) == 1, "replicas differ"
        return sent[0]

    figures: dict[str, float] = {}
    detail: dict[str, Any] = {"device": device}
    for precision in PRECISIONS:
        ends = {ours(precision, 2)[0]}

        def alone(precision: str = precision, ends: set[str] = ends) -> float:
            sha256, seconds = ours(precision)
            ends.add(sha256)
            return seconds

        seconds = _report.interleaved(
            {
                "ours": alone,
                "flags_off": lambda p=precision: ours(p, exact=False)[1],
                "plain": lambda p=precision: run_processes(_plain, 1, p, steps, device)[0],
            },
            repeats,
        )
        figures[f"exact_{precision}"] = float(len(ends) == 1)
        detail[precision] = {
            "deterministic_overhead": _report.ratio(seconds["ours"], seconds["flags_off"]),
            "throughput_vs_torch": _report.ratio(seconds["plain"], seconds["ours"]),
            "seconds": seconds,
        }
    detail["served_vs_onnx"] = served(device, repeats, steps)
    figures["served_vs_onnx"] = detail["served_vs_onnx"]["median"]
    for name in ("deterministic_overhead", "throughput_vs_torch"):
        figures[name] = detail["fp32"][name]["median"]
        figures[f"{name}_bf16"] = detail["bf16"][name]["median"]
    return figures, detail


def served(device: str, repeats: int, batches: int) -> dict[str, Any]:
    """Rows/s of a version's model on the device over ONNX Runtime's on one thread."""
    import torch

    from lepton_ray import models
    from lepton_ray.serving import package
    from lepton_ray.serving.runtime import OnnxModel
    from lepton_ray.serving.torch_model import TorchModel

    net = models.build(experiment("fp32", device).model, SHAPE, CLASSES).eval()
    x = dataset(SERVED_ROWS).train.x[:SERVED_ROWS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package.export(net, torch.from_numpy(x[:2].copy()), folder)
        on_cpu = OnnxModel(folder / "model.onnx")
        on_device = TorchModel(folder / "model.pt2", device)
    on_device.check(on_cpu)

    def timed(model: Any) -> float:
        for _ in range(batches // 5):
            model(x)
        start = time.perf_counter()
        for _ in range(batches):
            model(x)
        return (time.perf_counter() - start) / batches

    arms = {"device": lambda: timed(on_device), "onnx": lambda: timed(on_cpu)}
    seconds = _report.interleaved(arms, repeats)
    return _report.ratio(seconds["onnx"], seconds["device"]) | {"seconds": seconds}


def main() -> None:
    parser = _report.parser(__doc__)
    parser.add_argument("--device", choices=BATCH, default="cuda")
    options = parser.parse_args()
    import torch

    if options.device == "cpu":
        _report.finish(*measure("cpu", *((1, 5) if options.quick else (3, 20))))
        return
    if not torch.cuda.is_available():
        if not options.json:
            print("no GPU here: nothing is measured")
        _report.finish({}, {"device": "none"})
        return
    # cuBLAS reads it once, before its first use; plain PyTorch is not slowed by it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    figures, detail = measure("cuda", *((1, 20) if options.quick else (7, 100)))
    _report.finish(figures, {**detail, "device": torch.cuda.get_device_name()})


if __name__ == "__main__":
    main()
