"""Which sample is seen when, and the keys of all randomness: pure functions of positions.

Nothing here has state, so a step can be done again, by another replica, to the same bytes. For a
step i of an epoch, shard s of S takes ``perm(seed, epoch)[(i*b + j)*S + s]`` for j < b = batch/S,
which is the order of a ``DistributedSampler`` with S ranks.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit key for one stream of randomness, such as (seed, "dropout", step, shard)."""
    text = "|".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """A NumPy generator for one stream (counter-based Philox: the same on every machine)."""
    return np.random.Generator(np.random.Philox(key(seed, *parts)))


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, samples: int) -> Indices:
    """[samples] The order of one epoch."""
    order = generator(seed, "order", epoch).permutation(samples)
    order.setflags(write=False)
    return order


def steps_per_epoch(samples: int, batch: int) -> int:
    """Whole batches in an epoch; the last partial one is dropped."""
    return samples // batch


def shard_indices(
    *, seed: int, epoch: int, step: int, shard: int, shards: int, batch: int, samples: int
) -> Indices:
    """[batch / shards] The samples of one shard in the ``step``-th step of an epoch."""
    per_shard = batch // shards
    first = step * batch + shard
    return permutation(seed, epoch, samples)[first : first + per_shard * shards : shards]
