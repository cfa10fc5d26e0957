"""Arrays for many rows: in memory, or, when they are large, on disk and mapped into memory."""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.errors import DataError

MAPPED = 64 << 20  # bytes from which an array lies on disk


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros to write to; one on disk is in a file without a name under ``$TMPDIR``,
    which is gone when nobody looks at the array any more.

    Raises:
        DataError: when the disk has no room for it.
    """
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if size < MAPPED:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk ends the process later
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()} has no room for {size / 1e9:.1f} GB of rows "
                f"({error.strerror}): set TMPDIR to a folder on a larger disk"
            ) from error
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def take(values: npt.NDArray[Any], at: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """``values[at]`` in such an array."""
    return np.take(values, at, out=zeros(at.shape, values.dtype), mode="clip")
