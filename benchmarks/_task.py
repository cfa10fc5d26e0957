"""What every arm of benchmarks/tuning.py trains: one epoch at a time, the same code for all.

Needs torch, numpy and scikit-learn only, so that it runs in every peer's environment.
"""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path
from typing import Any

EPOCHS = 27
SPACE: dict[str, tuple[Any, ...]] = {
    "lr": ("log", 1e-4, 1.0),
    "weight_decay": ("log", 1e-6, 1e-1),
    "momentum": ("float", 0.0, 0.99),
    "batch": ("choice", 16, 32, 64, 128),
    "width": ("choice", 16, 32, 64, 128),
    "depth": ("int", 1, 3),
    "dropout": ("float", 0.0, 0.6),
}
OWN = {
    "lr": 0.01,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "batch": 32,
    "width": 32,
    "depth": 1,
    "dropout": 0.1,
}
TASKS = ("digits", "fashion")


def data(task: str) -> tuple[Any, Any, Any, Any]:
    """Training and validation arrays. The training sets are small, and a tenth of their labels are
    wrong, so that settings matter."""
    import numpy as np

    rng = np.random.default_rng(0)
    if task == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = x.astype(np.float32) / 16
        taken = 500
    else:
        folder = Path(os.environ.get("FASHION_MNIST", "data/fashion-mnist"))
        raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
        x = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32) / 255
        raw = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
        y = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
        taken = 2000
    order = rng.permutation(len(x))[: taken + 1000]
    x, y = x[order], y[order].astype(np.int64)
    train_y = y[:taken].copy()
    wrong = rng.random(taken) < 0.1
    train_y[wrong] = rng.integers(0, 10, wrong.sum())
    return x[:taken], train_y, x[taken:], y[taken:]


class Training:
    """One model with its settings.

    Args:
        arrays: what `data` gives.
    """

    def __init__(self, settings: dict[str, Any], arrays: Any, seed: int = 0) -> None:
        import torch
        from torch import nn

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._x, self._y, self._vx, self._vy = (torch.from_numpy(a) for a in arrays)
        sizes = [self._x.shape[1], *[settings["width"]] * settings["depth"]]
        layers: list[Any] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(settings["dropout"])]
        self._model = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
        self._optimizer = torch.optim.SGD(
            self._model.parameters(),
            lr=settings["lr"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
        )
        self._batch = settings["batch"]
        self.epoch = 0

    def train_epoch(self) -> float:
        """One epoch; the validation log-loss after it."""
        import torch
        from torch.nn import functional

        self._model.train()
        order = torch.randperm(len(self._x))
        for first in range(0, len(order), self._batch):
            rows = order[first : first + self._batch]
            loss = functional.cross_entropy(self._model(self._x[rows]), self._y[rows])
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self.epoch += 1
        self._model.eval()
        with torch.no_grad():
            return float(functional.cross_entropy(self._model(self._vx), self._vy))


class Noop:
    """A trial of no work: what is left is the tuner's own."""

    def __init__(self, *_: Any) -> None:
        self.epoch = 0

    def train_epoch(self) -> float:
        self.epoch += 1
        return 1.0 / self.epoch


def make(task: str, settings: dict[str, Any], arrays: Any, seed: int = 0) -> Training | Noop:
    return Noop() if task == "noop" else Training(settings, arrays, seed)


def arrays_of(task: str) -> Any:
    return None if task == "noop" else data(task)


def epochs_of(task: str) -> int:
    return 3 if task == "noop" else EPOCHS


class Log:
    """Where every trained-out trial is written: seconds since the start of the process, value."""

    def __init__(self, path: str) -> None:
        self._path = path

    def ready(self) -> None:
        """Everything is imported and started, the first trial is given out next."""
        with open(f"{self._path}.ready", "a") as file:
            file.write(f"{time.time()}\n")

    def whole(self, value: float) -> None:
        with open(self._path, "a") as file:
            file.write(f"{time.time()} {value}\n")
