"""How long a model takes for one row, the way it would be served: exported, on ONNX Runtime."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lepton_ray.data.dataset import Dataset
from lepton_ray.serving import package
from lepton_ray.serving.runtime import open_session, run_session

ROUNDS = 50


def latency_ms(model: nn.Module, dataset: Dataset) -> float:
    """Median milliseconds for one row on this machine, after a warm-up."""
    x = dataset.validation.x
    eager = copy.deepcopy(model).cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        package.export(eager, torch.from_numpy(x[:2].copy()), Path(folder))
        session = open_session(Path(folder) / "model.onnx")
        seconds = []
        for _ in range(2 * ROUNDS):
            began = time.perf_counter()
            run_session(session, x[:1])
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[ROUNDS:]) * 1000
