"""Models by name. A model is any function ``(input_shape, classes, **params) -> nn.Module``.

One for texts also has the argument ``vocabulary``, which the data give and an experiment does not.
A built-in one is a file here and a line in `BUILT_IN`; a person's own is
``package.module:function``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
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
    "text_bag": "lepton_ray.models.text_bag:text_bag",
    "text_cnn": "lepton_ray.models.text_cnn:text_cnn",
}
VOCABULARY = "vocabulary"


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
    return {p.name: p.default for p in taken if p.name != VOCABULARY}


def build(
    model: Model, input_shape: tuple[int, ...], classes: int, vocabulary: int | None = None
) -> nn.Module:
    """The module of a model section, on the CPU, in training mode.

    Args:
        vocabulary: how many words there are, for texts only.

    Raises:
        ExperimentError: for an unknown name or argument, a model that takes no texts or nothing
            else, or when the function refuses its values.
    """
    known = parameters(model.name)
    given = {} if vocabulary is None else {VOCABULARY: vocabulary}
    takes_texts = VOCABULARY in inspect.signature(find(model.name)).parameters
    if takes_texts != bool(given) and not (given and known is None):
        does = "takes texts only" if takes_texts else "takes no texts (it has no vocabulary)"
        fit = [name for name in BUILT_IN if name.startswith("text_") == bool(given)]
        raise ExperimentError(
            "experiment", [f"model.name: {model.name} {does}: set one of {', '.join(fit)}"]
        )
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
