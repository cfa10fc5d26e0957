"""What a model must be better than to be worth its cost: trivial, linear and boosted baselines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset
from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.training import forecasts, metrics, rankings, ratings
from lepton_ray.training.tasks import Answers, task_of

Matrix = Any  # of NumPy, or sparse of SciPy

MAX_ROWS = 60_000  # of the linear fit, so that it takes seconds
WHOLE_LABELS = 10  # that get so many rows; more get fewer
MIN_ROWS = 2000
FEWEST = 5  # samples with a label, and without it, to fit a model of it
MAX_ITERATIONS = 50
STRENGTHS = (1.0, 0.01)  # inverse regularisation; the validation split chooses
TEXT_STRENGTHS = (10.0, 100.0)  # TF-IDF rows have length 1


def measure(dataset: Dataset, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics of ``baseline`` (trivial), ``linear`` and, for a table or series, ``boosting``.

    What these are for interactions and series, `ratings`, `rankings` and `forecasts` say.
    """
    if dataset.schema.task == "ranking":
        return rankings.baselines(dataset)
    if dataset.schema.task == "forecast":
        return forecasts.baselines(dataset, seed)
    if isinstance(dataset.preprocess, InteractionFit):
        return ratings.baselines(dataset)
    found = {"baseline": trivial(dataset), "linear": linear(dataset, seed)}
    if "columns" in dataset.preprocess.facts:
        found["boosting"] = boosting(dataset, seed)
    task = task_of(dataset)
    return {name: task.measure(answers, dataset.test) for name, answers in found.items()}


def trivial(dataset: Dataset) -> Answers:
    """The training split's class or label shares, or its mean, whatever the input."""
    if dataset.schema.task == "multilabel":
        return np.tile(dataset.train.y.mean(axis=0), (len(dataset.test), 1))
    classes = len(dataset.schema.classes)
    if not classes:
        return np.full((len(dataset.test), 1), dataset.train.y.mean())
    share = np.bincount(dataset.train.y.astype(np.int64), minlength=classes) / len(dataset.train)
    return np.tile(share, (len(dataset.test), 1))


def linear(dataset: Dataset, seed: int) -> Answers:
    """Logistic or ridge regression on (at most `MAX_ROWS` of) the training split; of labels,
    one for each.

    On texts, of the TF-IDF of the words the model sees: of single words or of pairs too.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    rows = _rows(dataset, seed)
    y = dataset.train.y[rows]
    strengths = TEXT_STRENGTHS if "vocabulary" in dataset.preprocess.facts else STRENGTHS
    best, best_score, best_x = None, -np.inf, None
    for train, validation, test in _features(dataset, rows):
        for strength in strengths:
            model: Any = (
                LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
                if dataset.schema.classes
                else Ridge(alpha=1 / strength)
            )
            if dataset.schema.task == "multilabel":
                model = EachLabel(model)
            # Two threads wait for each other: 1.4 times as long for 20,000 rows, five for 1,000.
            with threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a baseline
                model.fit(train, y)
            score = model.score(validation, dataset.validation.y)
            if score > best_score:
                best, best_score, best_x = model, score, test
    return _answers(dataset, best, best_x)


def boosting(dataset: Dataset, seed: int) -> Answers:
    """Gradient boosted trees with scikit-learn's defaults, stopped on a tenth of the rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = (
        HistGradientBoostingClassifier if dataset.schema.classes else HistGradientBoostingRegressor
    )
    rows = _rows(dataset, seed)
    ((train, _, test),) = _features(dataset, rows)
    model: Any = kind(random_state=seed)
    if dataset.schema.task == "multilabel":
        model = EachLabel(model)
    y = dataset.train.y[rows]
    if dataset.schema.task == "classification":
        # It keeps some of each class aside to know when to stop, and cannot of a single one.
        more = np.bincount(y)[y] > 1
        if len(np.unique(y[more])) > 1:
            train, y = train[more], y[more]
    return _answers(dataset, model.fit(train, y), test)


class EachLabel:
    """One model of two classes for each of some labels.

    Not scikit-learn's, which has no answer for a label of one sample where a model keeps some of
    each class aside.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._fitted: list[Any] = []

    def fit(self, x: Matrix, y: npt.NDArray[np.integer]) -> EachLabel:
        """
        Args:
            y: [n, labels]
        """
        from sklearn.base import clone
        from sklearn.dummy import DummyClassifier

        self._fitted = []
        for has in y.T:
            rarer = min(int(has.sum()), int((1 - has).sum()))
            model = clone(self._model) if rarer >= FEWEST else DummyClassifier(strategy="prior")
            self._fitted.append(model.fit(x, has))
        return self

    def predict_proba(self, x: Matrix) -> Answers:
        """[n, labels]"""
        found = [model.predict_proba(x) for model in self._fitted]
        return np.stack(
            [
                of[:, 1] if of.shape[1] == 2 else np.full(len(of), float(model.classes_[0]))
                for of, model in zip(found, self._fitted, strict=True)
            ],
            axis=1,
        )

    def score(self, x: Matrix, y: npt.NDArray[np.integer]) -> float:
        """More is better."""
        return -metrics.labels(self.predict_proba(x), y)["loss"]


def _rows(dataset: Dataset, seed: int) -> npt.NDArray[np.int64]:
    """Training samples that a baseline is fitted to, by chance; fewer where many labels each take
    a fit of their own."""
    fits = len(dataset.schema.classes) if dataset.schema.task == "multilabel" else 1
    most = max(MIN_ROWS, MAX_ROWS // max(1, fits // WHOLE_LABELS))
    return np.random.default_rng(seed).permutation(len(dataset.train))[:most]


def _features(
    dataset: Dataset, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[Matrix, Matrix, Matrix]]:
    """[n, features] Of these training rows, the validation and the test split, to choose from."""
    parts = (dataset.train.x[rows], dataset.validation.x, dataset.test.x)
    if "vocabulary" not in dataset.preprocess.facts:
        train, validation, test = (x.reshape(len(x), -1) for x in parts)
        yield train, validation, test
        return
    from sklearn.feature_extraction.text import TfidfVectorizer

    for most in (1, 2):
        vectorizer = TfidfVectorizer(analyzer=partial(_ngrams, most=most), sublinear_tf=True)
        yield vectorizer.fit_transform(parts[0]), *map(vectorizer.transform, parts[1:])


def _ngrams(words: npt.NDArray[np.int32], most: int) -> list[tuple[int, ...]]:
    """The words of a text, and for ``most`` 2 its pairs of neighbours."""
    real = [word for word in words.tolist() if word]
    singles: list[tuple[int, ...]] = [(word,) for word in real]
    return singles + list(pairwise(real)) if most == 2 else singles


def _answers(dataset: Dataset, model: Any, x: Matrix) -> Answers:
    if not dataset.schema.classes:
        values: Answers = model.predict(x).reshape(-1, 1)
        return values
    if isinstance(model, EachLabel):
        return model.predict_proba(x)
    answers = np.zeros((len(dataset.test), len(dataset.schema.classes)))
    answers[:, model.classes_] = model.predict_proba(x)
    return answers
