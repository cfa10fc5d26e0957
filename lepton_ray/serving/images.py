"""Files of pictures as the numbers a model takes."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data import images
from lepton_ray.data.images import ImageError
from lepton_ray.data.schema import Column

FORMATS = ("PNG", "JPEG")  # no others: each is one more parser for a stranger's bytes


def decode(
    column: Column, content: bytes, formats: Collection[str] = FORMATS
) -> npt.NDArray[np.float32]:
    """[*column.shape] Numbers between the column's ends, from 0 to 255 of the file.

    A picture of another size is scaled only where training did so, since only a person knows how.

    Raises:
        ImageError: see `images.decode`.
    """
    if column.low is None and not column.resized:
        rule = "the model was trained on numbers of no known range: send an image as numbers"
        raise ImageError(rule, "a file")
    found = images.decode(content, column.shape, resized=column.resized, formats=formats)
    pixels = found.astype(np.float32)
    low, high = column.low or 0.0, 255.0 if column.high is None else column.high
    if (low, high) == (0.0, 255.0):
        return pixels
    return (low + pixels * ((high - low) / 255.0)).astype(np.float32)


def unpacked_bytes(column: Column, content: bytes) -> int:
    """What a file comes to while it is decoded, or its numbers after, from its head alone.

    Raises:
        ImageError: for one that is refused by its head.
    """
    with images.opened(io.BytesIO(content), FORMATS) as image:
        return 4 * max(math.prod(column.shape), image.width * image.height if column.resized else 0)


def from_base64(column: Column, text: str) -> bytes:
    """The file.

    Raises:
        ImageError: for what is no base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        rule = f"an image is numbers in nested lists of shape {list(column.shape)}, or a file"
        raise ImageError(f"{rule} in base64", _short(text)) from None


def _short(value: Any) -> str:
    text = repr(value[:80])
    return text if len(value) <= 80 else text + "..."
