"""Random changes of training images: pure functions of the seed, the epoch and the sample.

Which replica draws them, and whether a step is done twice, makes no difference.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Augment
from lepton_ray.data.order import generator
from lepton_ray.data.preprocess import Inputs

FLIP, DOWN, RIGHT, ERASE_DOWN, ERASE_RIGHT = range(5)  # columns of `draws`


@functools.lru_cache(maxsize=2)
def draws(seed: int, epoch: int, samples: int) -> npt.NDArray[np.float64]:
    """[samples, 5] Uniform numbers of one epoch, a row a sample."""
    drawn = generator(seed, "augment", epoch).random((samples, 5))
    drawn.setflags(write=False)
    return drawn


def augment(images: Inputs, drawn: npt.NDArray[np.float64], settings: Augment) -> Inputs:
    """Changed copies of normalised images.

    Args:
        images: [n, channels, height, width]
        drawn: [n, 5] the rows of `draws` that are theirs.
    """
    n, channels, height, width = images.shape
    shift = 2 * settings.shift + 1
    rows = np.arange(height) + _whole(drawn[:, DOWN], shift) - settings.shift
    columns = np.arange(width) + _whole(drawn[:, RIGHT], shift) - settings.shift
    if settings.flip:
        columns = np.where(drawn[:, FLIP, None] < 0.5, columns, width - 1 - columns)
    # What is shifted in repeats the border.
    rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    at = np.arange(n)[:, None, None, None], np.arange(channels)[None, :, None, None]
    changed: Inputs = images[*at, rows[:, None, :, None], columns[:, None, None, :]]
    if settings.erase:
        tall = _within(_whole(drawn[:, ERASE_DOWN], height), height, settings.erase)
        wide = _within(_whole(drawn[:, ERASE_RIGHT], width), width, settings.erase)
        changed[np.broadcast_to((tall[:, :, None] & wide[:, None, :])[:, None], changed.shape)] = 0
    return changed


def _whole(drawn: npt.NDArray[np.float64], below: int) -> npt.NDArray[np.int64]:
    """[n, 1] Whole numbers from 0."""
    return (drawn * below).astype(np.int64)[:, None]


def _within(center: npt.NDArray[np.int64], size: int, side: int) -> npt.NDArray[np.bool_]:
    """[n, size] Which positions lie in a square of ``side`` around it."""
    first = center - side // 2
    position = np.arange(size)
    return (position >= first) & (position < first + side)
