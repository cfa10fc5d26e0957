"""What a model must be better than to be worth its cost: a trivial and a linear baseline."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset

MAX_ROWS = 60_000  # of the linear fit, so that it takes seconds
MAX_ITERATIONS = 50
STRENGTHS = (1.0, 0.01)  # inverse regularisation; the validation split chooses

Probabilities = npt.NDArray[np.float64]


def trivial(dataset: Dataset) -> Probabilities:
    """[n_test, classes] The training split's class shares, whatever the input."""
    classes = len(dataset.schema.classes)
    share = np.bincount(dataset.train.y, minlength=classes) / len(dataset.train)
    return np.tile(share, (len(dataset.test), 1))


def linear(dataset: Dataset, seed: int) -> Probabilities:
    """[n_test, classes] Logistic regression on (at most `MAX_ROWS` of) the training split."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(seed).permutation(len(dataset.train))[:MAX_ROWS]
    x, y = _flat(dataset.train.x[rows]), dataset.train.y[rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a baseline
        models = [LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(x, y) for c in STRENGTHS]
    seen = _flat(dataset.validation.x)
    model = max(models, key=lambda m: m.score(seen, dataset.validation.y))
    answers = np.zeros((len(dataset.test), len(dataset.schema.classes)))
    answers[:, model.classes_] = model.predict_proba(_flat(dataset.test.x))
    return answers


def _flat(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return x.reshape(len(x), -1)
