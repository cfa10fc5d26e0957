"""A schema in MLflow's words."""

from __future__ import annotations

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType
from mlflow.types import Schema as MlflowSchema
from mlflow.types.schema import Array

from lepton_ray.data.schema import Column, Schema


def signature(schema: Schema) -> ModelSignature:
    """Numbers are doubles, an image or values over time nested arrays of doubles, all others
    strings."""
    inputs = MlflowSchema(
        [ColSpec(_type(c), c.name, required=not c.lookup) for c in schema.columns]
    )
    numbers = Array(DataType.double)
    listed: dict[str, list[Any]] = {
        "regression": [ColSpec(DataType.double, "value")],
        "ranking": [ColSpec(Array(DataType.string), "items"), ColSpec(numbers, "scores")],
        "forecast": [ColSpec(numbers, "values")],
    }
    if schema.task in listed:
        return ModelSignature(inputs, MlflowSchema(listed[schema.task]))
    probabilities = [ColSpec(DataType.double, f"probability_{c}") for c in schema.classes]
    answer = ColSpec(DataType.string, "label")
    if schema.task == "multilabel":
        answer = ColSpec(Array(DataType.string), "labels")
    outputs = MlflowSchema([answer, *probabilities])
    return ModelSignature(inputs=inputs, outputs=outputs)


def _type(column: Column) -> DataType | Array:
    if column.kind in ("image", "series"):
        nested: DataType | Array = DataType.double
        for _ in column.shape:
            nested = Array(nested)
        return nested
    return DataType.double if column.kind == "number" else DataType.string
