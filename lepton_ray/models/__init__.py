"""Models by name. A model is any function ``(input_shape, classes, **params) -> nn.Module``.

Some have an argument that the data give and an experiment does not: ``vocabulary`` (how many words
there are) of a model of texts, ``columns`` (which numbers belong together) of one of tables.
A built-in one is a file here and a line in `BUILT_IN`; a person's own is
``package.module:function``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lepton_ray.config.schema import Model
from lepton_ray.errors import ExperimentError, nearest

if TYPE_CHECKING:
    from torch import nn

Builder = Callable[..., "nn.Module"]

BUILT_IN = {
    "cnn": "lepton_ray.models.cnn:cnn",
    "linear": "lepton_ray.models.linear:linear",
    "mlp": "lepton_ray.models.mlp:mlp",
    "resnet": "lepton_ray.models.resnet:resnet",
    "table_resnet": "lepton_ray.models.table_resnet:table_resnet",
    "text_bag": "lepton_ray.models.text_bag:text_bag",
    "text_cnn": "lepton_ray.models.text_cnn:text_cnn",
}
VOCABULARY = "vocabulary"
FACTS = {VOCABULARY: "texts", "columns": "tables"}
"""What only the data can tell, and of which kind they are."""


def find(name: str) -> Builder:
    """The function a model name stands for.

    Raises:
        ExperimentError: when there is none.
    """
    target = BUILT_IN.get(name, name)
    module, colon, function = target.partition(":")
    if not colon:
        problem = (
            f"model.name: no model {name!r}, {nearest(name, BUILT_IN)}; or package.module:function"
        )
        raise ExperimentError("experiment", [problem])
    try:
        builder: Builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ExperimentError("experiment", [f"model.name: {name!r}: {error}"]) from error
    return builder


def parameters(name: str) -> dict[str, Any] | None:
    """Names and defaults of what an experiment may set; None when the model takes anything."""
    taken = list(inspect.signature(find(name)).parameters.values())[2:]
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return None
    return {p.name: p.default for p in taken if p.name not in FACTS}


def build(
    model: Model,
    input_shape: tuple[int, ...],
    classes: int,
    facts: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The module of a model section, on the CPU, in training mode.

    Args:
        facts: what only the data can tell, see `FACTS`.

    Raises:
        ExperimentError: for an unknown name or argument, a model for other data, or when the
            function refuses its values.
    """
    known = parameters(model.name)
    taken = inspect.signature(find(model.name)).parameters
    # A model of texts cannot do without its words, so one that takes anything gets them unnamed.
    given = {
        name: value
        for name, value in (facts or {}).items()
        if name in taken or (known is None and name == VOCABULARY)
    }
    for name, kind in FACTS.items():
        if name in taken and name not in given:
            fit = [n for n in BUILT_IN if not FACTS.keys() & inspect.signature(find(n)).parameters]
            raise _misfit(model.name, f"takes {kind} only", fit)
    if VOCABULARY in (facts or {}) and VOCABULARY not in given:
        fit = [n for n in BUILT_IN if VOCABULARY in inspect.signature(find(n)).parameters]
        raise _misfit(model.name, "takes no texts (it has no vocabulary)", fit)
    if known is not None:
        problems = [
            f"model.{p}: {model.name} takes no {p!r}, {nearest(p, known)}"
            for p in model.params
            if p not in known
        ]
        if problems:
            raise ExperimentError("experiment", problems)
    try:
        return find(model.name)(input_shape, classes, **given, **model.params)
    except (TypeError, ValueError) as error:
        raise ExperimentError("experiment", [f"model: {model.name}: {error}"]) from error


def _misfit(name: str, does: str, fit: list[str]) -> ExperimentError:
    return ExperimentError(
        "experiment", [f"model.name: {name} {does}: set one of {', '.join(fit)}"]
    )
