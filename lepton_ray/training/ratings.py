"""What a model of ratings must be better than."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.training import metrics

Floats = npt.NDArray[np.float64]

STRENGTHS = (1.0, 3.0, 10.0, 30.0)  # ratings of the mean that each bias starts from
ROUNDS = 10  # of users' and items' biases in turn; they move by less than a thousandth after


def baselines(dataset: Dataset) -> dict[str, dict[str, float]]:
    """Test metrics of ``baseline``, the mean rating, and of ``linear``: the mean plus a bias of the
    user and one of the item, both drawn towards zero where there are few ratings."""
    fitted, test = dataset.preprocess, dataset.test
    assert isinstance(fitted, InteractionFit)
    mean, deviation = fitted.target_mean, fitted.target_deviation
    found = {"baseline": np.full(len(test), mean), "linear": _biases(dataset, fitted)}
    return {name: metrics.regression(v, test.y, deviation) for name, v in found.items()}


def _biases(dataset: Dataset, fitted: InteractionFit) -> Floats:
    item_at = 1 + fitted.user.table.shape[1]
    sizes = (len(fitted.user.id.categories) + 1, len(fitted.item.id.categories) + 1)

    def ids(samples: Samples) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return samples.x[:, 0].astype(np.int64), samples.x[:, item_at].astype(np.int64)

    users, items = ids(dataset.train)
    residual = dataset.train.y - fitted.target_mean
    best: Floats | None = None
    best_error = np.inf
    for strength in STRENGTHS:
        of_user, of_item = np.zeros(sizes[0]), np.zeros(sizes[1])
        for _ in range(ROUNDS):
            of_item = _means(items, residual - of_user[users], sizes[1], strength)
            of_user = _means(users, residual - of_item[items], sizes[0], strength)

        def predict(samples: Samples, u: Floats = of_user, i: Floats = of_item) -> Floats:
            user, item = ids(samples)
            values: Floats = (fitted.target_mean + u[user] + i[item]).clip(fitted.low, fitted.high)
            return values

        error = float(np.square(predict(dataset.validation) - dataset.validation.y).mean())
        if error < best_error:
            best, best_error = predict(dataset.test), error
    assert best is not None
    return best


def _means(of: npt.NDArray[np.int64], values: Floats, size: int, strength: float) -> Floats:
    return np.bincount(of, values, size) / (np.bincount(of, minlength=size) + strength)
