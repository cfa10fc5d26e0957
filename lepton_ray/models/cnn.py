"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn

from lepton_ray.models.layout import pixel_wise


class CNN(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, channels, height, width]."""
        x = pixel_wise(x)
        for layer in self:
            x = layer(x)
        return x


def cnn(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 32,
    blocks: int = 2,
    convolutions: int = 1,
    dropout: float = 0.1,
) -> nn.Module:
    """``blocks`` of ``convolutions`` times (3x3 convolution, batch norm, ReLU) and a 2x2 max pool,
    channels doubling from ``width`` with each, then dropout and a linear layer (as in Simonyan and
    Zisserman, "Very Deep Convolutional Networks", 2015); logits [n, classes].

    Raises:
        ValueError: when the input is not an image or too small for that many halvings.
    """
    if len(input_shape) != 3:
        raise ValueError(f"cnn takes images (channels, height, width), got shape {input_shape}")
    if min(blocks, convolutions) < 1:
        raise ValueError(
            f"blocks and convolutions must be at least 1, got {blocks} and {convolutions}"
        )
    channels, height, width_px = input_shape
    if min(height, width_px) < 2**blocks:
        raise ValueError(f"{blocks} blocks need images of {2**blocks} pixels, got {input_shape}")
    layers: list[nn.Module] = []
    for block in range(blocks):
        out = width << block
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        layers.append(nn.MaxPool2d(2))
        height, width_px = height // 2, width_px // 2
    return CNN(
        *layers,
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(channels * height * width_px, classes),
    )
