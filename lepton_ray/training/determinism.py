"""What a replica's arithmetic depends on beside code and data: set in code, recorded, compared."""

from __future__ import annotations

import os
import platform
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lepton_ray.config.schema import Train
from lepton_ray.training import processor


@dataclass(frozen=True)
class NumericsProfile:
    """Two replicas with equal profiles compute the same bytes from the same input."""

    torch: str
    machine: str
    processor: str
    cpu_capability: str
    threads: int
    mkldnn: bool
    gpu: str
    cuda: str
    precision: str
    deterministic: bool
    compiled: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def configure(train: Train, device: torch.device) -> NumericsProfile:
    """Set threads and flags for this process; call before the first CUDA work.

    Ray gives workers ``OMP_NUM_THREADS`` from their CPUs, and LayerNorm's gradients differ between
    1 and 2 threads, so the number is set here and not left to the machine.
    """
    if train.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # For a model that compiles parts of itself: read when the compiler is loaded.
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.set_num_threads(train.threads)
    if train.compile:
        torch.use_deterministic_algorithms(train.exact)
    else:  # the same, but for torch's compiler, which takes seconds to load to be told of it
        torch.set_deterministic_debug_mode("error" if train.exact else "default")
    torch.backends.cudnn.deterministic = train.exact
    torch.backends.cudnn.benchmark = not train.exact
    if train.exact:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        # Uninitialised memory is never read by this code; filling it costs a pass over it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cuda = device.type == "cuda"
    return NumericsProfile(
        torch=torch.__version__,
        machine=platform.machine(),
        processor=processor.kind(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=train.threads,
        mkldnn=torch.backends.mkldnn.is_available(),
        gpu=torch.cuda.get_device_name(device) if cuda else "",
        cuda=torch.version.cuda or "" if cuda else "",
        precision=train.precision,
        deterministic=train.exact,
        compiled=train.compile,
    )


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """``["threads: 1 here, 2 there"]`` for every entry of two profiles that differs."""
    return [
        f"{name}: {ours.get(name)!r} here, {theirs.get(name)!r} there"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def seed_everything(key: int, device: torch.device) -> None:
    """Key the generators that model code may draw from.

    The default generator is seeded directly: ``torch.manual_seed`` visits every device and costs
    ten times as much.
    """
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
