"""All of a training that a step changes, and its form on disk: tensors by name and plain values.

The form holds no number of replicas, no random state and no loader state: those are functions of
the step.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lepton_ray import models
from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.data.order import key
from lepton_ray.errors import CheckpointError
from lepton_ray.training.exactness import refuse_inexact
from lepton_ray.training.optimization import build_optimizer


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

    def parts(self, limit_bytes: int) -> list[list[str]]:
        """Names of the model's weights, cut where the weights of a part reach a size."""
        cut: list[list[str]] = []
        size = limit_bytes
        for name, weight in self.model.state_dict().items():
            if size >= limit_bytes:
                cut.append([])
                size = 0
            cut[-1].append(name)
            size += weight.nbytes
        return cut

    def view(self, of: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`dump` without the copies: the next step changes the tensors.

        Args:
            of: only tensors and numbers that belong to these of the model's weights.
        """
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for prefix, weights in self._weights().items():
            tensors.update(
                {f"{prefix}.{n}": t for n, t in weights.items() if of is None or n in of}
            )
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        for index, slots in self.optimizer.state_dict()["state"].items():
            if of is not None and trained[index] not in of:
                continue
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

    def load(
        self, tensors: Mapping[str, Tensor], values: dict[str, Any], *, whole: bool = True
    ) -> None:
        """Become the state that was dumped; the model and optimizer must be of the same shapes.

        Args:
            whole: if not, tensors and the optimizer's numbers that are not given stay.

        Raises:
            CheckpointError: when tensors are missing or of other shapes.
        """
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        self.best = (best if whole else {**(self.best or {}), **best}) or None
        try:
            for prefix, module in (("model", self.model), ("averaged", self.averaged)):
                if module is not None:
                    part = {
                        n.removeprefix(f"{prefix}."): t
                        for n, t in tensors.items()
                        if n.startswith(f"{prefix}.")
                    }
                    module.load_state_dict(part, strict=whole)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint is of another model: {error}") from error
        packed = self.optimizer.state_dict()
        slots: dict[int, dict[str, Any]] = {} if whole else packed["state"]
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                slots.setdefault(int(index), {})[slot] = tensor
        for name, value in values["optimizer"].items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": packed["param_groups"]})
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


def initial_state(experiment: Experiment, dataset: Dataset, device: torch.device) -> TrainState:
    """What training starts from: weights drawn from the seed.

    Raises:
        ExperimentError: when the model cannot be trained exactly.
    """
    train = experiment.train
    torch.manual_seed(key(train.seed, "init"))
    model = models.build(
        experiment.model,
        dataset.preprocess.input_shape,
        dataset.schema.outputs,
        dataset.facts,
    ).to(device)
    refuse_inexact(model)
    optimizer = build_optimizer(train.optimizer, [p for p in model.parameters() if p.requires_grad])
    averaged = averaged_copy(model) if train.ema is not None else None
    return TrainState(model=model, optimizer=optimizer, averaged=averaged)


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy for averaged weights, never trained itself."""
    twin = copy.deepcopy(model)
    return twin.requires_grad_(False)
