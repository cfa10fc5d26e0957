"""What is measured of a version: its scores, and that its endpoint gives the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import EndpointError
from lepton_ray.serving.client import Client
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training.tasks import task_of


def score(runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Metrics of a version on the test split, from its own runtime.

    Classes are matched by name, so that a version trained on other labels is scored fairly.
    """
    answers = runtime.predict_columns(dataset.test_columns)
    task = task_of(dataset)
    if not dataset.schema.classes:
        return task.measure(answers, dataset.test.y)
    classes = list(runtime.schema.classes)
    probabilities: npt.NDArray[np.float64] = np.zeros((len(answers), len(dataset.schema.classes)))
    for position, label in enumerate(dataset.schema.classes):
        if label in classes:
            probabilities[:, position] = answers[:, classes.index(label)]
    return task.measure(probabilities, dataset.test.y)


def check_endpoint(client: Client, name: str, rows: list[dict[str, Any]]) -> int:
    """Send rows over HTTP and compare with the version that answered in this process, bit for bit.

    Raises:
        EndpointError: for any answer that differs.
    """
    answered = client.predict(rows)
    runtime = load_model(f"{name}/{answered['version']}")
    expected = [answer.model_dump() for answer in runtime.predict(rows)]
    for position, (ours, theirs) in enumerate(zip(expected, answered["predictions"], strict=True)):
        if ours != theirs:
            raise EndpointError(
                f"{client.url} answers row {position} with {theirs}, load_model with {ours}"
            )
    return len(rows)
