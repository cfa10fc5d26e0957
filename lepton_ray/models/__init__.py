"""Models by name. A model is any function ``(input_shape, classes, **params) -> nn.Module``.

Some have an argument that the data give and an experiment does not: ``vocabulary`` (how many words
there are) of a model of texts, ``columns`` (which numbers belong together) of one of tables,
``catalog`` (users and items) of one of interactions, ``window`` (what a sample holds) of series.
``starts_from``, what ``hf:NAME`` means, is read with the data, too.
A built-in one is a file here and a line in `BUILT_IN`; a person's own is
``package.module:function``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lepton_ray.config.schema import Model
from lepton_ray.data.pretrained import Pretrained, is_pretrained
from lepton_ray.errors import ExperimentError, nearest

if TYPE_CHECKING:
    from torch import nn

Builder = Callable[..., "nn.Module"]

BUILT_IN = {
    "cnn": "lepton_ray.models.cnn:cnn",
    "linear": "lepton_ray.models.linear:linear",
    "matrix_factorization": "lepton_ray.models.matrix_factorization:matrix_factorization",
    "hf:NAME": "lepton_ray.models.pretrained:pretrained",
    "mlp": "lepton_ray.models.mlp:mlp",
    "nbeats": "lepton_ray.models.nbeats:nbeats",
    "resnet": "lepton_ray.models.resnet:resnet",
    "table_resnet": "lepton_ray.models.table_resnet:table_resnet",
    "text_bag": "lepton_ray.models.text_bag:text_bag",
    "tcn": "lepton_ray.models.tcn:tcn",
    "text_cnn": "lepton_ray.models.text_cnn:text_cnn",
    "text_transformer": "lepton_ray.models.text_transformer:text_transformer",
    "two_tower": "lepton_ray.models.two_tower:two_tower",
}
FACTS = {
    "vocabulary": "texts",
    "starts_from": "texts or images prepared for it",
    "columns": "tables",
    "catalog": "interactions",
    "window": "series",
}
"""What only the data can tell, and of which kind they are."""
NEEDED = ("vocabulary", "catalog")
"""Numbers of words and ids say nothing to a model that does not know them for such."""


def find(name: str) -> Builder:
    """The function a model name stands for.

    Raises:
        ExperimentError: when there is none.
    """
    target = BUILT_IN.get("hf:NAME" if is_pretrained(name) else name, name)
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
    facts = facts or {}
    prepared = facts.get("starts_from")
    if isinstance(prepared, Pretrained) and prepared.name != model.name:
        problem = f"model.name: the data are prepared for {prepared.name}, so that {model.name} "
        raise ExperimentError("experiment", [problem + "cannot take them: set that, or load anew"])
    # A model that takes anything gets unnamed what no model of these data can do without.
    given = {
        name: value
        for name, value in facts.items()
        if name in taken or (known is None and name in NEEDED)
    }
    for name, kind in FACTS.items():
        if name in taken and name not in given:
            raise _misfit(model.name, f"takes {kind} only", facts)
    for name in NEEDED:
        if name in facts and name not in given and "starts_from" not in given:
            raise _misfit(model.name, f"takes no {FACTS[name]} (it has no {name})", facts)
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


def _misfit(name: str, does: str, facts: Mapping[str, Any]) -> ExperimentError:
    fit = []
    for other in BUILT_IN:
        taken = inspect.signature(find(other)).parameters.keys()
        needed = {fact for fact in NEEDED if fact in facts}
        if FACTS.keys() & taken <= facts.keys() and needed <= taken:
            fit.append(other)
    return ExperimentError(
        "experiment", [f"model.name: {name} {does}: set one of {', '.join(fit)}"]
    )
