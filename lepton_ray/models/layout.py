"""In which order the numbers of images lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_wise(x: Tensor) -> Tensor:
    """The same images [n, channels, height, width], on a CPU with the channels of a pixel side by
    side, which is how convolutions are fast there: 1.2 to 1.5 times in training.

    torch.channels_last leaves images of one channel as they are, and then what becomes of them too.
    An exported model is laid out by what runs it.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return x
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n, -1)
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)
