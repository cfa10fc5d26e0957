"""What training cannot take, and where it broke: named, with the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lepton_ray.errors import ExperimentError
from lepton_ray.training import digest
from lepton_ray.training.membership import Peers


def refuse_inexact(model: torch.nn.Module) -> None:
    """What the exact step cannot do.

    Raises:
        ExperimentError: naming the modules and tensors, and the way out.
    """
    problems = [
        f"model: {name or 'the model'} is SyncBatchNorm, which mixes shards: use BatchNorm, whose "
        "statistics are averaged over the shards of each step"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.SyncBatchNorm)
    ]
    problems += [
        f"model: {name} is {tensor.dtype}: weights must be float32; for less precise arithmetic "
        "set train.precision: bf16"
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    if problems:
        raise ExperimentError("experiment", problems)


COMPILED_WITH = {
    "No working C++ compiler found": "a C++ compiler (Debian: apt-get install g++; or name it in "
    "the variable CXX)",
    "Python.h: No such file": "Python's header files (Debian: apt-get install python3-dev)",
}
"""What torch.compile says where something is missing on the machine, and what that is."""


@contextlib.contextmanager
def naming_causes(source: str) -> Iterator[None]:
    """Tell what a person can change from other failures of a step: an operation that has no
    deterministic kernel, or what torch.compile misses.

    Raises:
        ExperimentError: naming it, and the way out.
    """
    try:
        yield
    except RuntimeError as error:
        _name_cause(error, source)
        raise


def _name_cause(error: RuntimeError, source: str) -> None:
    said = str(error)
    if "does not have a deterministic implementation" in said:
        operation = said.splitlines()[0]
        problem = f"model: {operation}; replace the operation, or set train.exact: false"
        raise ExperimentError(source, [problem]) from error
    for words, missing in COMPILED_WITH.items():
        if words in said:
            problem = f"train.compile: torch.compile needs {missing}, which is not here: install "
            problem += "it on every machine that trains, or set train.compile: false"
            raise ExperimentError(source, [problem]) from error


def first_difference(
    peers: Peers, step: int, gradients: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> str:
    """What to say when replicas hold different bytes. Collective over ``peers``."""
    names = [*(f"gradient {i}" for i in range(len(gradients))), *weights]
    mine = [digest.state_sha256({"": t}) for t in (*gradients, *weights.values())]
    tensor = digest.first_difference(peers.gather_json(mine)[: peers.hosts], names)
    return (
        f"replicas hold different bytes at step {step}, first in {tensor}: a replica's hardware or "
        "a model that keeps state outside its parameters and buffers"
    )
