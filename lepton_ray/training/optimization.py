"""Optimizers by name and the learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lepton_ray.config.schema import Optimizer, Schedule
from lepton_ray.errors import ExperimentError, nearest

NEEDS_CLOSURE = {"lbfgs"}  # evaluates the loss several times a step: not one reduced gradient
NEEDS_SPARSE = {"sparseadam"}


def known_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every class of torch.optim that takes one dense gradient a step, by lower-case name."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
        and name.lower() not in NEEDS_CLOSURE | NEEDS_SPARSE
    }


def optimizer_parameters(name: str) -> set[str]:
    """Names of the arguments an optimizer takes.

    Raises:
        ExperimentError: when torch.optim has no such class, or one that cannot be used here.
    """
    known = known_optimizers()
    if name.lower() not in known:
        problem = f"train.optimizer.name: no optimizer {name!r}, {nearest(name.lower(), known)}"
        raise ExperimentError("experiment", [problem])
    return set(inspect.signature(known[name.lower()]).parameters) - {"params"}


def build_optimizer(
    section: Optimizer, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of a section over the given parameters.

    Raises:
        ExperimentError: for an unknown name or argument, or a value torch refuses.
    """
    taken = optimizer_parameters(section.name)
    problems = [
        f"train.optimizer.{p}: {section.name} takes no {p!r}, {nearest(p, taken)}"
        for p in section.params
        if p not in taken
    ]
    if problems:
        raise ExperimentError("experiment", problems)
    try:
        kind = known_optimizers()[section.name.lower()]
        build: Callable[..., torch.optim.Optimizer] = _uncompiled(kind)
        return build(parameters, lr=section.lr, **section.params)
    except (TypeError, ValueError) as error:
        raise ExperimentError("experiment", [f"train.optimizer: {error}"]) from error


def _uncompiled(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer, which does not load torch's compiler.

    torch.optim loads it to keep it out of an optimizer's methods. That is a third of the time that
    a worker's process takes to start, and nothing here compiles an optimizer.
    """
    step = inspect.unwrap(kind.step)

    def as_it_is(self: torch.optim.Optimizer) -> None:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            step(self)

    kept = ("add_param_group", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in kept}
    return type(kind.__name__, (kind,), {**methods, "step": as_it_is})


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """What the base learning rate is multiplied by at ``step`` of ``total_steps``."""
    warmup_steps = round(schedule.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "step":
            return schedule.factor ** int(progress / schedule.every)
