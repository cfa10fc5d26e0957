"""A picture's bytes as pixels: one way for training, for files to predict and over HTTP."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Pixels = npt.NDArray[np.uint8]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # of a person's own files; each is one more parser
GREY = {"1", "L", "LA"}
MODES = {*GREY, "P", "PA", "RGB", "RGBA", "CMYK"}  # eight bits a channel, or fewer
BANDS = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 1 << 26  # of a file: 256 MiB as Pillow holds them
TOO_LARGE = f"an image has at most {MAX_PIXELS:,} pixels: make it smaller"
ROTATED = 5  # from this EXIF orientation on, width and height change places


class ImageError(ValueError):
    """The rule that a file breaks; the second argument is what it is instead."""

    def __init__(self, rule: str, value: str) -> None:
        self.rule, self.value = rule, value
        super().__init__(rule, value)

    def __str__(self) -> str:
        return f"{self.rule}, but got {self.value}"


def decode(
    content: bytes, shape: tuple[int, ...], *, resized: bool, formats: Collection[str] = FORMATS
) -> Pixels:
    """[*shape] Numbers from 0 to 255 of one still picture: a pure function of its bytes and shape.

    It is turned upright as its EXIF says; transparent parts become white unless the shape has four
    channels; colours become grey by ITU-R 601, and CMYK RGB.

    Args:
        shape: (height, width) for grey, or (height, width, channels).
        resized: scale the picture until it covers the shape, and cut off evenly what is over.
            Otherwise it must have that size.

    Raises:
        ImageError: for another format or mode, a damaged or moving picture, too large a one, or one
            of another size.
    """
    height, width, *channels = shape
    mode = BANDS[channels[0] if channels else 1]
    with opened(io.BytesIO(content), formats) as image:
        if resized:  # JPEG can be unpacked at a half, a quarter or an eighth: large photos take so
            image.draft(None, (2 * max(height, width),) * 2)
        elif image.size not in ((width, height), (height, width)):
            raise _wrong_size(image, width, height)
        ImageOps.exif_transpose(image, in_place=True)
        upright = _in_mode(image, mode)
        if resized:
            upright = ImageOps.fit(upright, (width, height))
        elif upright.size != (width, height):
            raise _wrong_size(upright, width, height)
        return np.asarray(upright, np.uint8).reshape(shape)


def size_of(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened picture when it is upright, from its head alone."""
    width, height = image.size
    # Where the head has no EXIF, Pillow would unpack a PNG to look for it behind the pixels.
    turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= ROTATED
    return (width, height) if turned else (height, width)


@contextmanager
def opened(file: BinaryIO, formats: Collection[str] = FORMATS) -> Iterator[Image.Image]:
    """A picture of which only the head is read: a file of a few bytes may claim to be any size.

    Raises:
        ImageError: see `decode`; also for what is found while the picture is unpacked in the block.
    """
    try:
        with Image.open(file, formats=list(formats)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(TOO_LARGE, f"{image.width} x {image.height}")
            if image.mode not in MODES:
                raise ImageError("an image has 8 bits a channel, grey, RGB or CMYK", image.mode)
            # Phones store a second view behind a JPEG (MPO); the first one is the picture.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ImageError("an image is a still picture", "one that moves")
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # far more, which Pillow refuses by itself
        raise ImageError(TOO_LARGE, "many more") from error
    except Exception as error:  # a damaged file can raise nearly anything in its parser
        *others, last = formats
        rule = f"the file must be a whole {', '.join(others)} or {last}"
        raise ImageError(rule, f"{_length(file)} bytes ({type(error).__name__})") from error


def _wrong_size(image: Image.Image, width: int, height: int) -> ImageError:
    return ImageError(
        f"an image must be {width} x {height} pixels: resize it",
        f"{image.width} x {image.height} pixels",
    )


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "RGBA" and image.has_transparency_data:
        # What lies under transparent parts was never meant to be seen.
        over = Image.new("RGBA", image.size, "white")
        over.alpha_composite(image.convert("RGBA"))
        image = over
    return image.convert(mode)


def _length(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)
