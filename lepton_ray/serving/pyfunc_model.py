"""What MLflow runs for a version: models-from-code, so that nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from lepton_ray.serving.answers import Answer, AnyAnswer, LabelsAnswer
from lepton_ray.serving.runtime import Runtime


class VersionModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Takes a data frame with the schema's columns; answers labels and probabilities, or values."""

    def load_context(self, context: Any) -> None:
        self._runtime = Runtime.load(Path(context.artifacts["version"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        # A frame's cell may hold arrays of arrays; rows of plain lists are what `predict` checks.
        rows = [
            {name: _plain(value) for name, value in row.items()}
            for row in model_input.to_dict("records")
        ]
        return pd.DataFrame([_flat(answer) for answer in self._runtime.predict(rows)])


def _flat(answer: AnyAnswer) -> dict[str, Any]:
    flat = answer.model_dump()
    if isinstance(answer, Answer | LabelsAnswer):
        del flat["probabilities"]
        flat |= {f"probability_{c}": p for c, p in answer.probabilities.items()}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | list):
        return [_plain(v) for v in value]
    return value


mlflow.models.set_model(VersionModel())
