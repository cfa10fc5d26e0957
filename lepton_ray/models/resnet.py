"""A small residual network for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lepton_ray.models.layout import pixel_wise


class Block(nn.Module):
    """Two 3x3 convolutions beside the input itself."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        same = x if self.shortcut is None else self.shortcut(active)
        changed: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return same + changed


class ResNet(nn.Module):
    def __init__(
        self, channels: int, classes: int, width: int, stages: int, blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        body: list[nn.Module] = []
        now = width
        for stage in range(stages):
            for block in range(blocks):
                body.append(Block(now, width << stage, 2 if stage and not block else 1))
                now = width << stage
        self.body = nn.Sequential(*body)
        self.norm = nn.BatchNorm2d(now)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(now, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, channels, height, width]."""
        maps = torch.relu(self.norm(self.body(self.stem(pixel_wise(x)))))
        logits: Tensor = self.head(self.dropout(maps.mean((2, 3))))
        return logits


def resnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 16,
    stages: int = 3,
    blocks: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """A residual network with normalisation before each convolution (He et al., "Identity Mappings
    in Deep Residual Networks", 2016): ``stages`` of ``blocks``, each stage at half the size and
    twice the channels of the one before, then the mean over the image and a linear layer.

    Raises:
        ValueError: when the input is not an image, or too small for that many halvings.
    """
    if len(input_shape) != 3:
        raise ValueError(f"resnet takes images (channels, height, width), got shape {input_shape}")
    if min(stages, blocks) < 1:
        raise ValueError(f"stages and blocks must be at least 1, got {stages} and {blocks}")
    channels, height, width_px = input_shape
    if min(height, width_px) < 2 ** (stages - 1):
        raise ValueError(
            f"{stages} stages need images of {2 ** (stages - 1)} pixels, got {input_shape}"
        )
    return ResNet(channels, classes, width, stages, blocks, dropout)
