"""What an explanation says, and what can be asked; loads no torch, which a replica does without."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from lepton_ray.data.schema import Schema
from lepton_ray.errors import InputError, nearest

KINDS = ("image", "text", "number", "category", "date")
"""Of the columns of what is explained."""
METHODS = ("integrated_gradients", "occlusion", "kernel_shap", "lime")


class Part(BaseModel):
    """One column of a table, or one word of a text."""

    name: str
    """The column, or the word as it stands in the text."""
    weight: float
    value: float | str | None = None
    """Of a column."""
    start: int | None = None
    end: int | None = None
    """Characters of a word."""


class Completeness(BaseModel):
    """Whether the weights account for all of the answer."""

    difference: float
    """Of the answer from the baseline's."""
    error: float
    """Of the weights' sum from that difference."""
    holds: bool
    """The error is at most 5% of the difference."""


class Explanation(BaseModel):
    """Why one row is answered so."""

    target: str
    """The class whose probability is explained; of a regression the target's name."""
    answer: float
    """That probability, or the value."""
    baseline: str
    baseline_answer: float
    method: str
    evaluations: int
    completeness: Completeness
    parts: list[Part] | None = None
    """Of a table or text, the heaviest first for a table."""
    weights: list[list[float]] | None = None
    """Of an image, by row and column of pixels."""
    heat_map: str | None = None
    """The image with what speaks for the answer in red and what speaks against it in blue: PNG,
    base64."""


class ExplainResponse(BaseModel):
    """What ``POST /explain`` answers."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    version: int
    explanations: list[Explanation]


def to_json(model: str, version: int, explanations: list[Explanation]) -> str:
    """What ``POST /explain`` answers, of a version of a model."""
    said = ExplainResponse(model=model, version=version, explanations=explanations)
    return said.model_dump_json(exclude_none=True)


def explains(schema: Schema) -> bool:
    """Whether answers of this kind are explained."""
    return all(column.kind in KINDS for column in schema.columns)


def check(schema: Schema, method: str | None, target: str | None) -> None:
    """
    Raises:
        InputError: for a model of interactions or series, and for a method or class that there is
            not.
    """
    if not explains(schema):
        raise InputError(
            f"answers from images, texts and tables are explained, but this model has the column "
            f"{next(c.name for c in schema.columns if c.kind not in KINDS)!r} of another kind"
        )
    if method is not None and method not in METHODS:
        raise InputError(f"no method {method!r}, {nearest(method, METHODS)}")
    if target is not None and not schema.classes:
        raise InputError(f"target is a class, but this model predicts a number: {target!r}")
    if target is not None and target not in schema.classes:
        raise InputError(f"no class {target!r}, {nearest(target, schema.classes)}")
