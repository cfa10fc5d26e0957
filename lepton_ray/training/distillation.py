"""Learning from a teacher: its outputs travel with the samples, and the loss looks at both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from lepton_ray.data.dataset import Samples

TEMPERATURE = 4.0
SOFT = 0.7  # share of the loss that is the teacher's; the rest is the task's


@dataclass(frozen=True, kw_only=True)
class Taught(Samples):
    """Samples of classes, each with what a teacher makes of it.

    A sample keeps its teacher's logits under augmentation: they are of the sample as it was.
    """

    logits: npt.NDArray[np.float32]
    """[n, classes]"""

    def batch(self, rows: npt.NDArray[np.int64], key: int) -> tuple[Any, Any]:
        """y is [rows, 1 + classes]: the class, then the logits (a float32 holds 2**24 classes)."""
        x, y = super().batch(rows, key)
        return x, np.column_stack([y, self.logits[rows]]).astype(np.float32)


def loss(hard: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A classification's loss mixed with the distance to the teacher's probabilities, both at
    `TEMPERATURE`, times its square so that gradients keep their size (Hinton et al., "Distilling
    the Knowledge in a Neural Network", 2015).

    Args:
        hard: (outputs [n, classes], y [n]) -> mean loss.

    Returns:
        (outputs [n, classes], y [n, 1 + classes] of `Taught.batch`) -> mean loss.
    """

    def mixed(outputs: Tensor, y: Tensor) -> Tensor:
        soft = functional.kl_div(
            functional.log_softmax(outputs.float() / TEMPERATURE, dim=1),
            functional.log_softmax(y[:, 1:] / TEMPERATURE, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - SOFT) * hard(outputs, y[:, 0].long()) + SOFT * TEMPERATURE**2 * soft

    return mixed
