"""What a model must be better than to be worth its cost: trivial, linear and boosted baselines."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset
from lepton_ray.training.tasks import Answers, task_of

MAX_ROWS = 60_000  # of the linear fit, so that it takes seconds
MAX_ITERATIONS = 50
STRENGTHS = (1.0, 0.01)  # inverse regularisation; the validation split chooses


def measure(dataset: Dataset, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics of ``baseline`` (trivial), ``linear`` and, for a table, ``boosting``."""
    found = {"baseline": trivial(dataset), "linear": linear(dataset, seed)}
    if dataset.schema.columns[0].kind != "image":
        found["boosting"] = boosting(dataset, seed)
    task = task_of(dataset)
    return {name: task.measure(answers, dataset.test.y) for name, answers in found.items()}


def trivial(dataset: Dataset) -> Answers:
    """The training split's class shares, or its mean, whatever the input."""
    classes = len(dataset.schema.classes)
    if not classes:
        return np.full((len(dataset.test), 1), dataset.preprocess.target_mean)
    share = np.bincount(dataset.train.y.astype(np.int64), minlength=classes) / len(dataset.train)
    return np.tile(share, (len(dataset.test), 1))


def linear(dataset: Dataset, seed: int) -> Answers:
    """Logistic or ridge regression on (at most `MAX_ROWS` of) the training split."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = _rows(dataset, seed)
    candidates: list[Any] = (
        [LogisticRegression(C=c, max_iter=MAX_ITERATIONS) for c in STRENGTHS]
        if dataset.schema.classes
        else [Ridge(alpha=1 / c) for c in STRENGTHS]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a baseline
        models = [model.fit(x, y) for model in candidates]
    seen = _flat(dataset.validation.x)
    return _answers(dataset, max(models, key=lambda m: m.score(seen, dataset.validation.y)))


def boosting(dataset: Dataset, seed: int) -> Answers:
    """Gradient boosted trees with scikit-learn's defaults, stopped on a tenth of the rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = (
        HistGradientBoostingClassifier if dataset.schema.classes else HistGradientBoostingRegressor
    )
    x, y = _rows(dataset, seed)
    return _answers(dataset, kind(random_state=seed).fit(x, y))


def _rows(dataset: Dataset, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.generic]]:
    rows = np.random.default_rng(seed).permutation(len(dataset.train))[:MAX_ROWS]
    return _flat(dataset.train.x[rows]), dataset.train.y[rows]


def _answers(dataset: Dataset, model: Any) -> Answers:
    x = _flat(dataset.test.x)
    if not dataset.schema.classes:
        values: Answers = model.predict(x).reshape(-1, 1)
        return values
    answers = np.zeros((len(x), len(dataset.schema.classes)))
    answers[:, model.classes_] = model.predict_proba(x)
    return answers


def _flat(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return x.reshape(len(x), -1)
