"""Peer: BentoML with adaptive batching; served by ``bentoml serve``. MODEL is in LEPTON_MODEL."""

from __future__ import annotations

import os

import bentoml
import torch
from serving_models import answers, make, scaled


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 1000})
class Peer:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = make(os.environ["LEPTON_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)
    def predict(self, rows: list[dict]) -> list[dict]:
        x = scaled([row["image"] for row in rows])
        with torch.inference_mode():
            return answers(self.model(x))
