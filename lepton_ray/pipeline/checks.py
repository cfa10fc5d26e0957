"""What is measured of a version: its scores, and that its endpoint gives the same answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.errors import EndpointError
from lepton_ray.serving.client import Client
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import Runtime
from lepton_ray.tracking.gate import Served
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.training import metrics
from lepton_ray.training.tasks import task_of

TIMED_ROWS = 100


def score(runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Metrics of a version on the test split, from its own runtime and by its own decision.

    Classes and items are matched by name, so that a version trained on others is scored fairly.
    """
    return _measured(runtime, dataset, runtime.predict_columns(dataset.test_columns), slice(None))


def score_slices(runtime: Runtime, dataset: Dataset) -> dict[str, dict[str, dict[str, float]]]:
    """Column -> group -> ``samples`` and the metrics of that group of the test split."""
    if not dataset.slices:
        return {}
    answers = runtime.predict_columns(dataset.test_columns)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for column, groups in dataset.slices.items():
        found[column] = {}
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            measured = _measured(runtime, dataset, answers, rows)
            found[column][str(group)] = {"samples": float(len(rows)), **measured}
    return found


def _measured(
    runtime: Runtime, dataset: Dataset, answers: npt.NDArray[Any], rows: Any
) -> dict[str, float]:
    """Metrics of the answers in some rows of the test split."""
    if not dataset.schema.classes:
        if dataset.schema.task == "ranking":
            answers = _by_items(answers, runtime.schema.items, dataset.schema.items)
        samples = dataset.test
        if not isinstance(rows, slice):
            samples = Samples(x=samples.x[rows], y=samples.y[rows])
        return task_of(dataset).measure(answers[rows], samples)
    answers, y = answers[rows], dataset.test.y[rows]
    known = {label: at for at, label in enumerate(dataset.schema.classes)}
    probabilities: npt.NDArray[np.float64] = np.zeros((len(answers), len(known)))
    for position, label in enumerate(runtime.schema.classes):
        if label in known:
            probabilities[:, known[label]] = answers[:, position]
    if dataset.schema.task == "multilabel":
        return metrics.labels(probabilities, y, _chosen_labels(runtime, answers, known))
    # A class that the data do not have is a wrong answer, whatever its number.
    names = [known.get(label, -1) for label in runtime.schema.classes]
    predicted = np.array(names)[runtime.decision.chosen(answers)]
    return metrics.classification(probabilities, y.astype(np.int64), predicted)


def score_labels(runtime: Runtime, dataset: Dataset) -> dict[str, dict[str, float]]:
    """Label -> its metrics on the test split, see `metrics.each_label`; nothing without labels."""
    if dataset.schema.task != "multilabel":
        return {}
    answers = runtime.predict_columns(dataset.test_columns)
    chosen = runtime.decision.chosen(answers)
    return metrics.each_label(answers, dataset.test.y, chosen, dataset.schema.classes)


def _chosen_labels(
    runtime: Runtime, answers: npt.NDArray[Any], known: Mapping[str, int]
) -> npt.NDArray[np.int64]:
    """[n, known] 1 for each label of the data that a version answers; also of an earlier version
    that answers one class."""
    decided = runtime.decision.chosen(answers)
    if decided.ndim == 1:
        decided = np.eye(answers.shape[1], dtype=np.int64)[decided]
    chosen = np.zeros((len(answers), len(known)), np.int64)
    for position, label in enumerate(runtime.schema.classes):
        if label in known:
            chosen[:, known[label]] = decided[:, position]
    return chosen


def _by_items(
    scores: npt.NDArray[np.floating], own: tuple[str, ...], wanted: tuple[str, ...]
) -> npt.NDArray[np.floating]:
    """[n, wanted] The scores of items by name; the lowest for those a version does not know."""
    if own == wanted:
        return scores
    known = {item: position for position, item in enumerate(own)}
    places = [known.get(item, -1) for item in wanted]
    lowest = np.full((len(scores), 1), scores[np.isfinite(scores)].min(initial=0.0) - 1.0)
    return np.concatenate([scores, lowest], axis=1)[:, places]


def measure_served(version: ModelVersion, dataset: Dataset) -> Served:
    """What serving a version takes: its latency here, its size, and its parity as registered."""
    folder = version.folder()
    runtime = Runtime.load(folder)
    seconds = []
    for at in range(TIMED_ROWS):
        row = at % len(dataset.test)
        one = {name: values[row : row + 1] for name, values in dataset.test_columns.items()}
        start = time.perf_counter()
        runtime.forward(one)
        seconds.append(time.perf_counter() - start)
    return Served(
        latency_ms=statistics.median(seconds) * 1000,
        mb=(folder / "model.onnx").stat().st_size / 1e6,
        difference=float(runtime.manifest["parity"]["largest_difference_over_runtimes"]),
    )


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
