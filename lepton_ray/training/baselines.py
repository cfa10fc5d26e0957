"""What a model must be better than to be worth its cost: a trivial and a linear baseline."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset

MAX_ROWS = 10_000  # of the linear fit, so that it takes seconds; more changes its accuracy little
MAX_ITERATIONS = 200

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
    x, y = dataset.train.x[rows].reshape(len(rows), -1), dataset.train.y[rows]
    model = LogisticRegression(max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a baseline
        model.fit(x, y)
    answers = np.zeros((len(dataset.test), len(dataset.schema.classes)))
    answers[:, model.classes_] = model.predict_proba(dataset.test.x.reshape(len(dataset.test), -1))
    return answers
