"""Images are laid out for the CPU inside of a model, and are answered the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lepton_ray.models.cnn import cnn
from lepton_ray.models.resnet import resnet


@pytest.mark.parametrize("make", [cnn, resnet])
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_have_the_channels_of_a_pixel_side_by_side(make, channels: int) -> None:
    model = make((channels, 8, 8), 4, width=6).eval()
    seen: list[bool] = []

    def look(_: nn.Module, __: object, made: Tensor) -> None:
        seen.append(made.is_contiguous(memory_format=torch.channels_last))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.register_forward_hook(look)
    x = torch.randn(3, channels, 8, 8)
    answers = model(x)
    assert len(seen) > 1
    assert all(seen)
    if make is cnn:
        torch.testing.assert_close(answers, nn.Sequential(*model)(x))


def test_a_block_has_as_many_convolutions_as_are_asked_for() -> None:
    model = cnn((1, 8, 8), 4, width=2, blocks=2, convolutions=3)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [2, 2, 2, 4, 4, 4]
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)
    with pytest.raises(ValueError, match="convolutions must be at least 1, got 2 and 0"):
        cnn((1, 8, 8), 4, convolutions=0)
