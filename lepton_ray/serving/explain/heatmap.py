"""An image with the weights of its pixels laid over it."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 224  # pixels that the longer side is brought to at least, so that a person sees something
FOR, AGAINST = (214, 40, 40), (29, 78, 216)  # red and blue, told apart by the colour-blind too
STRONG = 99.0  # percentile of the weights that gets full colour: one pixel must not fade the rest


def png(image: npt.NDArray[np.floating], weights: npt.NDArray[np.floating]) -> str:
    """Base64 of a PNG.

    Args:
        image: [height, width] or [height, width, channels] from 0 to 1.
        weights: [height, width] above 0 for the answer, below against it.
    """
    grey = image if image.ndim == 2 else image[..., :3].mean(axis=2)
    # Faint, since colour has to be seen on black and on white.
    shade = (0.25 + 0.6 * np.clip(grey, 0, 1))[..., None] * np.full(3, 255.0)
    strength = np.abs(weights)
    most = np.percentile(strength, STRONG) or strength.max() or 1.0
    mix = np.sqrt(np.clip(strength / most, 0, 1))[..., None]
    colour = np.where(weights[..., None] > 0, np.array(FOR), np.array(AGAINST))
    mixed = (shade * (1 - mix) + colour * mix).round().astype(np.uint8)
    picture = Image.fromarray(mixed)
    scale = -(-SIDE // max(picture.size))
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    # Pixels that were repeated are runs: as small as what zlib looks for in 13 times as long.
    picture.save(file, "PNG", compress_type=zlib.Z_RLE)
    return base64.b64encode(file.getvalue()).decode()
