"""Optimizers: those of torch, without its compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lepton_ray.config.schema import Optimizer
from lepton_ray.training.optimization import build_optimizer, known_optimizers

STEPS = 4
TRAINING = """
import sys
from lepton_ray import data
from lepton_ray.training.loop import Replica
from tests.unit.test_exactness import experiment

wanted = experiment("mlp", "adamw", epochs=1)
for _ in Replica(wanted, data.load(wanted.data)).epochs():
    pass
assert "torch._dynamo" not in sys.modules, "it takes seconds of each worker"
"""


def trained(build: type[torch.optim.Optimizer] | None, name: str) -> dict[str, torch.Tensor]:
    """A parameter and what the optimizer keeps of it, saved and loaded on the way."""

    def fresh() -> torch.optim.Optimizer:
        if build is not None:
            return build([parameter], lr=0.1)
        return build_optimizer(Optimizer(name=name, lr=0.1), [parameter])

    parameter = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = fresh()
    for step in range(STEPS):
        if step == STEPS // 2:
            kept, optimizer = optimizer.state_dict(), fresh()
            optimizer.load_state_dict(kept)
        parameter.grad = torch.linspace(0.1, 1, 12).reshape(3, 4) * (step + 1)
        optimizer.step()
    tensors = {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    return {**tensors, "parameter": parameter.detach()}


@pytest.mark.parametrize("name", sorted(known_optimizers()))
def test_each_changes_parameters_as_torch_s_own(name: str) -> None:
    ours, theirs = trained(None, name), trained(known_optimizers()[name], name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_training_does_not_load_the_compiler() -> None:
    subprocess.run([sys.executable, "-c", TRAINING], check=True, timeout=300)
