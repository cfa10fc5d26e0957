"""All of a training that a step changes, and its form on disk: tensors by name and plain values.

The form holds no number of replicas, no random state and no loader state: those are functions of
the step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lepton_ray.errors import CheckpointError


@dataclass
class TrainState:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: nn.Module | None = None
    """Copy of the model with averaged weights (``train.ema``)."""
    step: int = 0
    """Steps done."""
    loss: Tensor | None = None
    """[1] Mean loss of the last step."""
    links: list[tuple[int, str]] = field(default_factory=list)
    """The chained digest: (step, link), each over its step's tensors and the link before."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per finished epoch."""
    best: dict[str, Tensor] | None = None
    """Weights of the best epoch, kept when training stops early."""
    best_epoch: int = -1

    @property
    def digest(self) -> str:
        """Last link of the chained digest; "" before the first."""
        return self.links[-1][1] if self.links else ""

    @property
    def evaluated(self) -> nn.Module:
        """The module that is evaluated and served."""
        return self.averaged if self.averaged is not None else self.model

    def final_weights(self) -> dict[str, Tensor]:
        """The weights training ends with: the best epoch's where there is one."""
        weights = self.best if self.best is not None else self.evaluated.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def keep_best(self, epoch: int) -> None:
        self.best = {n: t.detach().clone() for n, t in self.evaluated.state_dict().items()}
        self.best_epoch = epoch

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of all tensors by name, and the plain values; `load` takes them back."""
        tensors, values = self.view()
        copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        return copies, values

    def view(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`dump` without the copies: the next step changes the tensors."""
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for prefix, weights in self._weights().items():
            tensors.update({f"{prefix}.{name}": t for name, t in weights.items()})
        for index, slots in self.optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                elif isinstance(value, int | float | bool) or value is None:
                    scalars[f"{index}.{name}"] = value
                else:
                    raise CheckpointError(
                        f"{type(self.optimizer).__name__} keeps {name!r} as "
                        f"{type(value).__name__}; only tensors and numbers can be saved"
                    )
        values = {
            "step": self.step,
            "loss": None if self.loss is None else float(self.loss),
            "links": list(self.links),  # copies: training goes on while this is written
            "history": list(self.history),
            "best_epoch": self.best_epoch,
            "optimizer": scalars,
        }
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Become the state that was dumped; the model and optimizer must be of the same shapes.

        Raises:
            CheckpointError: when tensors are missing or of other shapes.
        """
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        self.best = best or None
        try:
            for prefix, module in (("model", self.model), ("averaged", self.averaged)):
                if module is not None:
                    part = {
                        n.removeprefix(f"{prefix}."): t
                        for n, t in tensors.items()
                        if n.startswith(f"{prefix}.")
                    }
                    module.load_state_dict(part)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint is of another model: {error}") from error
        slots: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                slots.setdefault(int(index), {})[slot] = tensor
        for name, value in values["optimizer"].items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(
            {"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.step = int(values["step"])
        loss = values["loss"]
        self.loss = None if loss is None else torch.tensor([loss])
        self.links = [(int(step), str(link)) for step, link in values["links"]]
        self.history = list(values["history"])
        self.best_epoch = int(values["best_epoch"])

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        parts = {"model": self.model.state_dict()}
        if self.averaged is not None:
            parts["averaged"] = self.averaged.state_dict()
        if self.best is not None:
            parts["best"] = self.best
        return parts


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy for averaged weights, never trained itself."""
    twin = copy.deepcopy(model)
    return twin.requires_grad_(False)
