"""A person's own model, as ``tests.nets:transformer`` in an experiment."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lepton_ray import models


class Transformer(nn.Module):
    """Rows of an image as tokens."""

    def __init__(self, rows: int, columns: int, classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(columns, width)
        self.position = nn.Parameter(torch.randn(rows, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1, 2)) + self.position
        return self.head(self.encoder(tokens).mean(1))


def transformer(input_shape: tuple[int, ...], classes: int, *, width: int = 16) -> nn.Module:
    channels, height, columns = input_shape
    return Transformer(channels * height, columns, classes, width)


class Fork(nn.Module):
    """Uses one of two layers by the first sample, so that shards leave parameters unused."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.left = nn.Linear(features, classes)
        self.right = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.left(flat) if flat[0].sum() > 0 else self.right(flat)


def fork(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    features = 1
    for size in input_shape:
        features *= size
    return Fork(features, classes)


class Keeper(nn.Module):
    """Buffers of many kinds: constant ones with infinities, and ones that every forward changes."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, classes)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("hash", torch.tensor(2**40 + 1))
        self.register_buffer("odd", torch.tensor([True, False]))
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.training:
            self.hash += 2**33 + 1
            self.odd ^= True
            self.mean = 0.9 * self.mean + 0.1 * flat.detach().mean(0)  # another tensor in its place
        attention = torch.softmax(self.mask, 1).sum() + self.turns.abs().sum()
        return self.layer(flat - self.mean) * attention / 7


def keeper(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    features = 1
    for size in input_shape:
        features *= size
    return Keeper(features, classes)


def explode(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A model whose forward raises once it is trained."""

    class Explode(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                print("about to explode")
                raise RuntimeError("this model cannot be trained")
            return super().forward(x.flatten(1))

    size = 1
    for n in input_shape:
        size *= n
    return Explode(size, classes)


class Sleepy(nn.Module):
    """Any model with a pause in its training, long enough for a cluster to change meanwhile.

    Args:
        until: a file that ends the pauses by being there.
    """

    def __init__(self, model: nn.Module, pause_s: float, until: str) -> None:
        super().__init__()
        self.model = model
        self.pause_s = pause_s
        self.until = until

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not (self.until and os.path.exists(self.until)):
            time.sleep(self.pause_s)
        return self.model(x)


def sleepy(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    inner: str,
    pause_s: float,
    until: str = "",
    **params: Any,
) -> nn.Module:
    return Sleepy(models.find(inner)(input_shape, classes, **params), pause_s, until)


class Mortal(nn.Module):
    """Any model; in replica 1 it ends its process in the fifth step, the first time.

    Args:
        once: a file that says that it has.
    """

    def __init__(self, model: nn.Module, once: str) -> None:
        super().__init__()
        self.model = model
        self.once = once
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        second = dist.is_initialized() and dist.get_rank() == 1
        if second and self.steps == 5 and not os.path.exists(self.once):
            open(self.once, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model(x)


def mortal(
    input_shape: tuple[int, ...], classes: int, *, inner: str, once: str, **params: Any
) -> nn.Module:
    return Mortal(models.find(inner)(input_shape, classes, **params), once)


class Scatter(nn.Linear):
    """Uses an operation that has no deterministic kernel."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.flatten(1))
        return out + torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2)).sum()


def scatter(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    size = 1
    for n in input_shape:
        size *= n
    return Scatter(size, classes)


def synchronized(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(models.find("cnn")(input_shape, classes))


def doubles(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return models.find("mlp")(input_shape, classes).double()


def deaf(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Gives the same for all that is large."""
    first = nn.Linear(input_shape[0], 4)
    nn.init.constant_(first.weight, -1.0)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, classes))


def chatty(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    print("a person's own line")
    return models.find("linear")(input_shape, classes)
