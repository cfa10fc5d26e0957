"""Divide samples into training, validation and test: pure functions of labels and a seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Split
from lepton_ray.data.order import generator
from lepton_ray.errors import DataError

Indices = npt.NDArray[np.int64]
Labels = npt.NDArray[np.str_] | npt.NDArray[np.float64] | npt.NDArray[np.bool_]


DRAWS = 20  # of a split by labels, until each is on both sides


def divide(
    labels: Labels,
    split: Split,
    given_test: npt.NDArray[np.bool_] | None,
    *,
    groups: npt.NDArray[Any] | None = None,
    times: npt.NDArray[np.float64] | None = None,
) -> dict[str, Indices]:
    """Sorted sample indices of ``train``, ``validation`` and ``test``; stratified by label unless
    the labels are numbers, or the samples are taken by groups or times.

    Args:
        labels: [n] classes or numbers; or [n, labels] which ones a sample has. Then each sample is
            counted to the rarest label that it has.
        groups: [n] samples of one value stay in one split.
        times: [n] the latest ones are the test, the latest of the rest the validation split.

    Raises:
        DataError: when a split is empty, a label has one sample or is missing from the training
            split.
    """
    numbers, several = labels.dtype.kind == "f", labels.ndim == 2
    if not numbers and not several and split.test != "given":
        found, counts = np.unique(labels, return_counts=True)
        if counts.min(initial=2) < 2:
            raise DataError(
                f"label {str(found[counts.argmin()])!r} has one sample, and a class needs two, one "
                f"to learn and one to test ({int((counts < 2).sum())} such labels): add samples of "
                "it, or drop it"
            )
    strata = np.zeros(len(labels)) if numbers else labels

    def taken(among: Indices, share: float, name: str) -> Indices:
        if times is not None:
            return _latest(among, times, share)
        if several and groups is None:
            draws = (generator(split.seed, name, draw) for draw in range(DRAWS))
            return _both_sides(among, labels, share, draws)
        rng = generator(split.seed, name)
        if groups is not None:
            return _whole_groups(among, groups, share, rng)
        return _stratified(among, strata, share, rng)

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
        test = taken(everything, split.test, "test")
        rest = _without(everything, test)
    validation = taken(rest, split.validation, "validation")
    parts = {
        "train": _without(rest, validation),
        "validation": validation,
        "test": test,
    }
    for name, indices in parts.items():
        if len(indices) == 0:
            raise DataError(
                f"the {name} split is empty: {len(labels)} samples with data.split "
                f"test={split.test} validation={split.validation}; raise the share or add samples"
            )
    if numbers or several:
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


def _without(indices: Indices, taken: Indices) -> Indices:
    """Those of sorted ``indices`` that are not in ``taken``, which are some of them."""
    kept = np.ones(len(indices), np.bool_)
    kept[np.searchsorted(indices, taken)] = False
    return indices[kept]


def _whole_groups(
    indices: Indices, groups: npt.NDArray[Any], share: float, rng: np.random.Generator
) -> Indices:
    """Groups by chance until they are as near to a share of ``indices`` as they come."""
    names, inverse, counts = np.unique(groups[indices], return_inverse=True, return_counts=True)
    order = rng.permutation(len(names))
    reached = np.cumsum(counts[order])
    wanted = share * len(indices)
    take = int(np.searchsorted(reached, wanted))
    if take < len(order):  # with the group that goes beyond, if that is nearer
        before = reached[take - 1] if take else 0
        take += bool(reached[take] - wanted < wanted - before) or take == 0
    chosen: Indices = indices[np.isin(inverse, order[:take])]
    return chosen


def _latest(indices: Indices, times: npt.NDArray[np.float64], share: float) -> Indices:
    """The latest share of ``indices``; samples of one time stay together, on the later side."""
    if not len(indices):
        return indices
    ordered = np.sort(times[indices])
    first = ordered[min(len(ordered) - 1, round((1 - share) * len(ordered)))]
    if first == ordered[0]:  # some are left for training
        later = ordered[ordered > first]
        if not len(later):
            raise DataError(
                f"{len(indices)} samples have the same time, so that none of them is later than "
                "another: name another column in data.split.time"
            )
        first = later[0]
    chosen: Indices = indices[times[indices] >= first]
    return chosen


def _stratified(
    indices: Indices,
    labels: Labels | Indices,
    share: float,
    rng: np.random.Generator,
    least: int = 0,
) -> Indices:
    """A share of ``indices`` with every label's own share, to the nearest sample.

    Args:
        least: samples of a label, where that leaves some.
    """
    chosen = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        taken = max(round(share * len(members)), min(least, len(members) - 1))
        chosen.append(rng.permutation(members)[:taken])
    return np.sort(np.concatenate(chosen)) if chosen else indices[:0]


def _both_sides(
    indices: Indices, truth: npt.NDArray[Any], share: float, draws: Iterable[np.random.Generator]
) -> Indices:
    """A share of ``indices``, each counted to its rarest label, of that draw which leaves the
    fewest labels that one side knows nothing of; sooner the side that is taken."""
    strata = rarest(truth)
    best, fewest = indices[:0], math.inf
    for rng in draws:
        chosen = _stratified(indices, strata, share, rng, least=1)
        left = truth[_without(indices, chosen)]
        missing = len(_alike(truth[chosen])) + truth.shape[1] * len(_alike(left))
        if missing < fewest:
            best, fewest = chosen, missing
        if not missing:
            break
    return best


def rarest(truth: npt.NDArray[Any]) -> Indices:
    """[n] The rarest thing that holds of a sample: that it has a label, or where most samples have
    it that it has not; the number of labels where nothing rare does."""
    counts = truth.sum(axis=0)
    rare = np.where(counts * 2 <= len(truth), truth, ~truth)
    order = np.argsort(rare.sum(axis=0), kind="stable")
    ranked = rare[:, order]
    return np.where(ranked.any(axis=1), order[ranked.argmax(axis=1)], len(order))


def check_labels(names: Sequence[str], y: npt.NDArray[Any], parts: Mapping[str, Indices]) -> str:
    """What a person should know of labels that cannot be measured; empty for nothing.

    Args:
        y: [n, names] 1 where a sample has a label.

    Raises:
        DataError: for a label that no training sample has, or all have.
    """
    alike = {part: _alike(y[rows]) for part, rows in parts.items()}
    if len(alike["train"]):
        at = int(alike["train"][0])
        has = "every" if y[parts["train"], at].all() else "no"
        raise DataError(
            f"{has} sample of the training split has the label {names[at]!r}, but some others "
            f"{'have it not' if has == 'every' else 'have it'} ({len(alike['train'])} such labels):"
            " a model cannot learn it; add samples, or take it out of the target"
        )
    told = [
        f"{part} has no samples with and without {', '.join(repr(names[at]) for at in found[:3])}"
        + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        for part, found in alike.items()
        if len(found)
    ]
    return f"warning: {'; '.join(told)}: they are not measured there" if told else ""


def _alike(y: npt.NDArray[Any]) -> Indices:
    """The labels which all samples have, or none."""
    counts = y.sum(axis=0)
    return np.flatnonzero((counts == 0) | (counts == len(y)))
