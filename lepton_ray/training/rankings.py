"""How good a ranking is, and what it must be better than."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset, Samples

Floats = npt.NDArray[np.floating]

MOST_ITEMS = 4000  # of the linear baseline, which inverts a matrix of items by items
STRENGTHS = (30.0, 100.0, 300.0, 1000.0)  # of its regularisation; the validation split chooses


def measure(scores: Floats, y: npt.NDArray[np.int8], k: int) -> dict[str, float]:
    """``recall`` and ``ndcg`` among the first ``k``, and ``loss``, the mean cross-entropy (nats) of
    the items to find among all that a user has not had; each a mean over users.

    Recall is of what can be found: a user with more than ``k`` items to find has 1 for ``k`` hits.

    Args:
        scores: [users, items]
        y: [users, items] 1 for an item to find, -1 for one had before, which is left out.
    """
    scores = np.where(y < 0, -np.inf, scores.astype(np.float64))
    wanted = y > 0
    k = min(k, scores.shape[1])
    # Equal scores in the order of the items, on any machine.
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    hits = np.take_along_axis(wanted, best, axis=1)
    findable = np.minimum(wanted.sum(axis=1), k)
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gains)])[findable]
    highest = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - highest).sum(axis=1, keepdims=True)) + highest
    surprise = np.where(wanted, total - np.where(wanted, scores, 0.0), 0.0).sum(axis=1)
    return {
        "loss": float((surprise / wanted.sum(axis=1)).mean()),
        "recall": float((hits.sum(axis=1) / findable).mean()),
        "ndcg": float(((hits * gains).sum(axis=1) / ideal).mean()),
    }


def baselines(dataset: Dataset) -> dict[str, dict[str, float]]:
    """Test metrics of ``baseline``, how often each item was taken, and where there are not too many
    items of ``linear``: each item's score from those a user took, by a ridge regression in closed
    form (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019)."""
    items, k = len(dataset.schema.items), dataset.schema.top_k
    taken = dataset.train.x
    popular = np.log1p(np.bincount(taken[:, -1].astype(np.int64), minlength=items + 1)[1:])
    test = dataset.test
    found = {"baseline": np.tile(popular, (len(test), 1))}
    if items <= MOST_ITEMS:
        found["linear"] = _linear(dataset, items, k)
    return {name: measure(scores, test.y, k) for name, scores in found.items()}


def _linear(dataset: Dataset, items: int, k: int) -> Floats:
    pairs = dataset.train.x[:, [0, -1]].astype(np.int64)
    rows = np.zeros((int(pairs[:, 0].max()) + 1, items), np.float32)
    rows[pairs[:, 0], pairs[:, 1] - 1] = 1.0
    gram = (rows.T @ rows).astype(np.float64)

    def score(weights: Floats, samples: Samples) -> Floats:
        users = samples.x[:, 0].astype(np.int64)
        found: Floats = rows[users] @ weights
        return found

    best, best_ndcg = None, -1.0
    for strength in STRENGTHS:
        inverse = np.linalg.inv(gram + strength * np.eye(items))
        weights = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        validation = dataset.validation
        ndcg = measure(score(weights, validation), validation.y, k)["ndcg"]
        if ndcg > best_ndcg:
            best, best_ndcg = weights, ndcg
    assert best is not None
    return score(best, dataset.test)
