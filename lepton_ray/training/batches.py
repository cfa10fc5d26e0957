"""What each shard of each step trains on: a function of the seed, the step and the shard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lepton_ray.config.schema import Train
from lepton_ray.data.augment import augment, draws
from lepton_ray.data.dataset import Samples
from lepton_ray.data.order import key, shard_indices, steps_per_epoch

Batch = tuple[Tensor, Tensor]
"""Inputs and targets of one shard, on the device."""


def batches(train: Train, samples: Samples, device: torch.device) -> Callable[[int, int], Batch]:
    """(step, shard) -> the shard's batch."""
    epoch_steps = steps_per_epoch(len(samples), train.batch)

    def fetch(step: int, shard: int) -> Batch:
        epoch, epoch_step = divmod(step, epoch_steps)
        rows = shard_indices(
            seed=train.seed,
            epoch=epoch,
            step=epoch_step,
            shard=shard,
            shards=train.n_shards,
            batch=train.batch,
            samples=len(samples),
        )
        x, y = samples.batch(rows, key(train.seed, "draw", step, shard))
        if train.augment is not None:
            x = augment(x, draws(train.seed, epoch, len(samples))[rows], train.augment)
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    return fetch
