"""A version's `model.pt2` on a GPU. Replicas on a CPU do without torch, see `runtime`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.export.passes import move_to_device_pass

from lepton_ray.data.preprocess import Inputs
from lepton_ray.errors import ModelError, ServingError
from lepton_ray.serving.runtime import Model

CHECKED = 8  # rows that the device must answer as ONNX Runtime does


@dataclass(frozen=True, kw_only=True)
class Form:
    """How torch runs a version; the manifest of one that `optimize` made says so."""

    bf16: bool = False
    """Products in bfloat16 with sums in single precision, by torch.autocast."""
    compiled: bool = False
    """By torch.compile: when a version is loaded, for any number of rows."""

    def tolerance(self, outputs: npt.NDArray[np.float32]) -> float:
        """The difference that its arithmetic alone may make.

        The other order of a GPU's sums makes far less than a thousandth of the largest output,
        TF32 more; bfloat16 rounds what each layer gives to 8 bits.
        """
        return (0.1 if self.bf16 else 1e-3) * max(1.0, float(np.abs(outputs).max()))


FORMS = {
    "bf16": Form(bf16=True),
    "compiled": Form(compiled=True),
    "bf16, compiled": Form(bf16=True, compiled=True),
}
"""Beside which stands single precision, as it is."""


class TorchModel:
    """See `runtime.Model`.

    Args:
        device: such as ``cuda``.

    Raises:
        ServingError: when torch does not have the device.
    """

    def __init__(self, path: Path, device: str, form: Form = Form()) -> None:
        self._device = torch.device(device)
        self._form = form
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ServingError(
                f"torch {torch.__version__} finds no GPU on the machine where the model is to run: "
                "install a build of torch for it there, or leave serve.gpus at 0 (and --gpu out)"
            )
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        program = move_to_device_pass(torch.export.load(path), self._device)
        (name,) = program.graph_signature.user_inputs
        self._taken = next(n.meta["val"] for n in program.graph.nodes if n.name == name)
        self._module: Callable[[torch.Tensor], torch.Tensor] = program.module()
        if form.compiled:
            self._module = torch.compile(self._module, dynamic=True)

    def __call__(self, x: Inputs) -> npt.NDArray[np.float32]:
        products = torch.autocast(self._device.type, torch.bfloat16, enabled=self._form.bf16)
        with torch.inference_mode(), products:
            given = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
            outputs: npt.NDArray[np.float32] = self._module(given).float().cpu().numpy()
        return outputs

    def blank(self, rows: int) -> Inputs:
        return torch.zeros(rows, *self._taken.shape[1:], dtype=self._taken.dtype).numpy()

    def check(self, other: Model) -> None:
        """Both answer the same rows alike: random numbers, or of words the unknown one everywhere.

        Raises:
            ModelError: naming the difference.
        """
        x = self.blank(CHECKED)
        if x.dtype == np.float32:
            x = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        else:
            x = np.ones_like(x)  # of texts 0 is the padding, which alone is none
        mine, theirs = self(x), other(x)
        difference = float(np.abs(mine - theirs).max())
        if not difference <= self._form.tolerance(theirs):
            raise ModelError(
                f"on {self._device} the model differs from ONNX Runtime by {difference:.2e}: it "
                "is not served there, leave serve.gpus at 0"
            )
