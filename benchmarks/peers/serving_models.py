"""The two models of benchmarks/serving.py, in PyTorch alone: every peer loads the same weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

SHAPES = {"mlp": (8, 8), "cnn": (28, 28)}


def make(name: str, seed: int = 0) -> nn.Module:
    """Takes [n, 1, height, width] of 0 to 1."""
    torch.manual_seed(seed)
    if name == "mlp":
        layers = [
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 10),
        ]  # fmt: skip
    else:
        layers = [
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
        ]  # fmt: skip
    return nn.Sequential(*layers).eval()


def scaled(images: list) -> Tensor:
    """[n, 1, height, width] Of 0 to 1, from n pictures of 0 to 255."""
    return torch.from_numpy(np.array(images, np.float32)[:, None] / np.float32(255))


def answers(outputs: Tensor) -> list[dict[str, object]]:
    """What lepton_ray answers too: the label and every class's probability."""
    found = outputs.softmax(1)
    labels = found.argmax(1).tolist()
    return [
        {"label": str(label), "probabilities": {str(i): p for i, p in enumerate(row)}}
        for label, row in zip(labels, found.tolist(), strict=True)
    ]
