"""A small convolutional network for small images."""

from __future__ import annotations

from torch import nn


def cnn(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 32,
    blocks: int = 2,
    dropout: float = 0.1,
) -> nn.Module:
    """``blocks`` times (3x3 convolution, batch norm, ReLU, 2x2 max pool), channels doubling from
    ``width``, then dropout and a linear layer; logits [n, classes].

    Raises:
        ValueError: when the input is not an image or too small for that many halvings.
    """
    if len(input_shape) != 3:
        raise ValueError(f"cnn takes images (channels, height, width), got shape {input_shape}")
    channels, height, width_px = input_shape
    if min(height, width_px) < 2**blocks:
        raise ValueError(f"{blocks} blocks need images of {2**blocks} pixels, got {input_shape}")
    layers: list[nn.Module] = []
    for block in range(blocks):
        out = width << block
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels, height, width_px = out, height // 2, width_px // 2
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(channels * height * width_px, classes),
    )
