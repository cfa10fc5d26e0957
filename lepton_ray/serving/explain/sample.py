"""One sample as a function of which of its parts are there.

The parts are a table's columns, a text's words or an image's pixels; ``z`` says of each how far it
is there, from 0 (as in the baseline) to 1 (as in the sample). What a method makes of that function
is then the same for all kinds of data, and a column of several inputs has one weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sample:
    parts: int
    smooth: Function | None
    """z [n, parts] -> outputs [n, outputs], with gradients; None where there are none."""
    rough: Function
    """The same for z of zeros and ones only."""
    groups: Tensor
    """[parts] Number of the group that a method without gradients takes a part with, from 0."""


def of_numbers(
    model: nn.Module, x: Tensor, baseline: Tensor, part_of: Tensor, groups: Tensor
) -> Sample:
    """
    Args:
        x, baseline: [*input_shape] inputs.
        part_of: [*input_shape] the part that each input belongs to.
    """

    def outputs(z: Tensor) -> Tensor:
        found: Tensor = model(baseline + (x - baseline) * z[:, part_of])
        return found

    return Sample(parts=len(groups), smooth=outputs, rough=outputs, groups=groups)


def of_words(model: torch.fx.GraphModule, words: Tensor, places: Tensor) -> Sample:
    """
    Args:
        words: [most words] numbers of words, 0 behind the text's end.
        places: [parts] where the text's own words are; marks around them always stay.
    """
    embedded = _Embedded(model)

    def whole(z: Tensor) -> Tensor:
        return torch.ones(len(z), len(words)).index_copy(1, places, z)

    def smooth(z: Tensor) -> Tensor:
        return embedded.outputs(words.expand(len(z), -1), whole(z))

    def rough(z: Tensor) -> Tensor:
        found: Tensor = model(torch.where(whole(z) > 0.5, words, torch.zeros_like(words)))
        return found

    possible = len(places) > 0 and embedded.reaches(words)
    return Sample(
        parts=len(places),
        smooth=smooth if possible else None,
        rough=rough,
        groups=torch.arange(len(places)),
    )


class _Embedded(torch.fx.Interpreter):
    """Runs a model of texts with each word's vector scaled.

    A word's number has no gradient, its vector has; and the exported program names the operation
    that looks it up, whatever the model's code was.
    """

    def __init__(self, model: torch.fx.GraphModule) -> None:
        super().__init__(model)
        self._z: Tensor | None = None
        self._scaled = 0

    def outputs(self, words: Tensor, z: Tensor) -> Tensor:
        self._z, self._scaled = z, 0
        found: Tensor = self.run(words)
        return found

    def reaches(self, words: Tensor) -> bool:
        """Whether the model looks up each of its words, and nothing longer."""
        with torch.no_grad():
            self.outputs(words.expand(2, -1), torch.ones(2, len(words)))
        return self._scaled == self._looked_up > 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._looked_up = 0
        return super().run(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().call_function(target, args, kwargs)
        if target is torch.ops.aten.embedding.default:
            assert self._z is not None
            self._looked_up += 1
            if tuple(args[1].shape) == tuple(self._z.shape):
                self._scaled += 1
                return found * self._z.unsqueeze(2)
        return found
