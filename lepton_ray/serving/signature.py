"""A schema in MLflow's words."""

from __future__ import annotations

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType
from mlflow.types import Schema as MlflowSchema
from mlflow.types.schema import Array

from lepton_ray.data.schema import Column, Schema


def signature(schema: Schema) -> ModelSignature:
    """Numbers are doubles, an image nested arrays of doubles, all others strings."""
    inputs = MlflowSchema([ColSpec(_type(c), c.name) for c in schema.columns])
    if not schema.classes:
        return ModelSignature(inputs, MlflowSchema([ColSpec(DataType.double, "value")]))
    probabilities = [ColSpec(DataType.double, f"probability_{c}") for c in schema.classes]
    outputs = MlflowSchema([ColSpec(DataType.string, "label"), *probabilities])
    return ModelSignature(inputs=inputs, outputs=outputs)


def _type(column: Column) -> DataType | Array:
    if column.kind == "image":
        nested: DataType | Array = DataType.double
        for _ in column.shape:
            nested = Array(nested)
        return nested
    return DataType.double if column.kind == "number" else DataType.string
