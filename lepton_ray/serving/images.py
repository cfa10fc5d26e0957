"""PNG and JPEG files as the pixels a model takes."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lepton_ray.data.schema import Column

FORMATS = ("PNG", "JPEG")  # no others: each is one more parser for a stranger's bytes
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # eight bits a channel, or fewer


class ImageError(ValueError):
    """The rule that a file breaks; the second argument is what it is instead."""

    def __init__(self, rule: str, value: str) -> None:
        self.rule, self.value = rule, value
        super().__init__(rule, value)


def decode(column: Column, content: bytes) -> npt.NDArray[np.float32]:
    """[*column.shape] Numbers between the column's ends, from 0 to 255 of the file.

    Nothing is resized, since only a person knows how. The size is read from the head of the file,
    before any pixel is unpacked: a file of a few bytes may claim to be any size.

    Raises:
        ImageError: for another format or size.
    """
    height, width, *channels = column.shape
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.size != (width, height):
                raise ImageError(
                    f"an image must be {width} x {height} pixels: resize it",
                    f"{image.size[0]} x {image.size[1]} pixels",
                )
            if image.mode not in MODES:
                raise ImageError("an image has 8 bits a channel, grey or RGB", image.mode)
            of = {1: "L", 3: "RGB", 4: "RGBA"}[channels[0] if channels else 1]
            pixels = np.asarray(image.convert(of), np.float32)
    except ImageError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything in its parser
        raise ImageError(
            "the file must be a whole PNG or JPEG", f"{len(content)} bytes ({type(error).__name__})"
        ) from error
    low, high = column.low or 0.0, 255.0 if column.high is None else column.high
    scaled = pixels if (low, high) == (0.0, 255.0) else low + pixels * ((high - low) / 255.0)
    return scaled.reshape(column.shape).astype(np.float32)


def decode_base64(column: Column, text: str) -> npt.NDArray[np.float32]:
    """The same, of a file in base64.

    Raises:
        ImageError: see `decode`; and for what is no base64.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        rule = f"an image is numbers in nested lists of shape {list(column.shape)}, or a file"
        raise ImageError(f"{rule} in base64", _short(text)) from None
    return decode(column, content)


def _short(value: Any) -> str:
    text = repr(value[:80])
    return text if len(value) <= 80 else text + "..."
