"""Divide samples into training, validation and test: pure functions of labels and a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Split
from lepton_ray.data.order import generator
from lepton_ray.errors import DataError

Indices = npt.NDArray[np.int64]
Labels = npt.NDArray[np.str_] | npt.NDArray[np.float64]


def divide(
    labels: Labels,
    split: Split,
    given_test: npt.NDArray[np.bool_] | None,
) -> dict[str, Indices]:
    """Sorted sample indices of ``train``, ``validation`` and ``test``; stratified by label unless
    the labels are numbers.

    Raises:
        DataError: when a split is empty, a label has one sample or is missing from the training
            split.
    """
    numbers = labels.dtype.kind == "f"
    if not numbers and split.test != "given":
        found, counts = np.unique(labels, return_counts=True)
        if counts.min(initial=2) < 2:
            raise DataError(
                f"label {str(found[counts.argmin()])!r} has one sample, and a class needs two, one "
                f"to learn and one to test ({int((counts < 2).sum())} such labels): add samples of "
                "it, or drop it"
            )
    strata = np.zeros(len(labels)) if numbers else labels
    if split.test == "given":
        if given_test is None:
            raise DataError(
                "data.split.test is 'given', but the source has no test part: set a share, or name "
                "the column that says it in data.split.column"
            )
        test = np.flatnonzero(given_test)
        rest = np.flatnonzero(~given_test)
    else:
        everything = np.arange(len(labels))
        test = _stratified(everything, strata, split.test, generator(split.seed, "test"))
        rest = np.setdiff1d(everything, test)
    validation = _stratified(rest, strata, split.validation, generator(split.seed, "validation"))
    parts = {
        "train": np.setdiff1d(rest, validation),
        "validation": validation,
        "test": test,
    }
    for name, indices in parts.items():
        if len(indices) == 0:
            raise DataError(
                f"the {name} split is empty: {len(labels)} samples with data.split "
                f"test={split.test} validation={split.validation}; raise the share or add samples"
            )
    if numbers:
        return parts
    known = set(labels[parts["train"]])
    for name in ("validation", "test"):
        unseen = sorted(set(labels[parts[name]]) - known)
        if unseen:
            raise DataError(
                f"label {str(unseen[0])!r} occurs in the {name} split but never in the training "
                f"split ({len(unseen)} such labels): a model cannot learn it; add samples of it, "
                "or drop them"
            )
    return parts


def _stratified(
    indices: Indices,
    labels: Labels,
    share: float,
    rng: np.random.Generator,
) -> Indices:
    """A share of ``indices`` with every label's own share, to the nearest sample."""
    chosen = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        chosen.append(rng.permutation(members)[: round(share * len(members))])
    return np.sort(np.concatenate(chosen)) if chosen else indices[:0]
