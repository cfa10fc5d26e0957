"""From a model's outputs to calibrated probabilities and an answer: fitted on validation samples.

It travels with a version, and batch and endpoint decide by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Evaluate
from lepton_ray.data.schema import Schema
from lepton_ray.errors import ExperimentError

Floats = npt.NDArray[np.float32]
SCALES = (0.01, 100.0)  # a factor of logits beyond these says that there is nothing to calibrate on
PENALTY = 1e-3  # of a factor and shift, so that classes that can be told apart leave both finite


@dataclass(frozen=True, kw_only=True)
class Decision:
    scale: float = 1.0
    """Of the logits."""
    shift: float = 0.0
    """Added to the second of two classes' logit, after the scale."""
    threshold: float = 0.5
    """Of two classes, above which probability of the second it is the answer."""

    def probabilities(self, logits: Floats) -> Floats:
        """[n, classes], row by row, so that an answer does not depend on the rows beside it."""
        if self.scale != 1.0 or self.shift:
            logits = logits * np.float32(self.scale)
            logits[:, 1] += np.float32(self.shift)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: Floats = shifted / shifted.sum(axis=1, keepdims=True)
        return result

    def chosen(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """[n] Index of the class that is the answer."""
        if probabilities.shape[1] == 2 and self.threshold != 0.5:
            return (probabilities[:, 1] > self.threshold).astype(np.int64)
        likeliest: npt.NDArray[np.int64] = probabilities.argmax(1)
        return likeliest


@dataclass(frozen=True, kw_only=True)
class LabelDecision:
    """The same where a sample has any of some labels: for each its own scale, shift and threshold,
    as if having it were the second of two classes."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    threshold: tuple[float, ...]

    def probabilities(self, logits: Floats) -> Floats:
        """[n, labels] of having each."""
        scaled = logits * np.array(self.scale, np.float32) + np.array(self.shift, np.float32)
        with np.errstate(over="ignore"):  # one over infinity is what it should be
            result: Floats = np.float32(1) / (np.float32(1) + np.exp(-scaled))
        return result

    def chosen(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """[n, labels] 1 for each that the answer has."""
        return (probabilities > np.array(self.threshold)).astype(np.int64)


AnyDecision = Decision | LabelDecision


def plain(schema: Schema) -> AnyDecision:
    """Outputs as they are: the likeliest class, or all labels that are likelier than not."""
    if schema.task != "multilabel":
        return Decision()
    n = len(schema.classes)
    return LabelDecision(scale=(1.0,) * n, shift=(0.0,) * n, threshold=(0.5,) * n)


def from_json(schema: Schema, value: dict[str, Any]) -> AnyDecision:
    """The inverse of `dataclasses.asdict`, over JSON."""
    if schema.task != "multilabel":
        return Decision(**value)
    return LabelDecision(**{name: tuple(numbers) for name, numbers in value.items()})


def check(asked: Evaluate, schema: Schema) -> None:
    """
    Raises:
        ExperimentError: for what needs classes, or two of them, where there are others.
    """
    if schema.task == "multilabel":  # each label is two classes: it is there or not
        return
    classes = len(schema.classes)
    problems = []
    if asked.calibrate != "none" and (classes == 0 or (asked.calibrate == "platt" and classes > 2)):
        wants = "two classes" if asked.calibrate == "platt" else "classes"
        problems.append(f"evaluate.calibrate: {asked.calibrate} is for {wants}")
    if asked.threshold != 0.5 and classes != 2:
        problems.append(f"evaluate.threshold: {asked.threshold} is for two classes")
    if problems:
        told = [
            f"{problem}, but there are {classes or 'none'}: leave it out" for problem in problems
        ]
        raise ExperimentError("experiment", told)


def fit_labels(logits: Floats, y: npt.NDArray[Any], asked: Evaluate) -> LabelDecision:
    """The same for each label by itself; one that all validation samples have, or none, says
    nothing of what else is asked for.

    Args:
        logits: [n, labels] of the trained model.
        y: [n, labels] 1 for each that a sample has.
    """
    each = []
    for of_label, has in zip(logits.T, y.T, strict=True):
        two = np.stack([np.zeros_like(of_label), of_label], axis=1)
        number = asked.threshold if isinstance(asked.threshold, float) else 0.5
        both = 0 < has.sum() < len(has)
        each.append(fit(two, has, asked) if both else Decision(threshold=number))
    return LabelDecision(
        scale=tuple(found.scale for found in each),
        shift=tuple(found.shift for found in each),
        threshold=tuple(found.threshold for found in each),
    )


def fit(logits: Floats, y: npt.NDArray[Any], asked: Evaluate) -> Decision:
    """What the validation samples say; the plain decision where nothing else is asked for.

    Args:
        logits: [n, classes] of the trained model.
        y: [n] index of the true class.
    """
    scale, shift = _calibration(logits.astype(np.float64), y, asked.calibrate)
    decision = Decision(scale=scale, shift=shift)
    if isinstance(asked.threshold, str):
        second = decision.probabilities(logits)[:, 1].astype(np.float64)
        threshold = _threshold(second, y, SCORES[asked.threshold])
    else:
        threshold = asked.threshold
    return Decision(scale=scale, shift=shift, threshold=threshold)


def _calibration(
    logits: npt.NDArray[np.float64], y: npt.NDArray[Any], how: str
) -> tuple[float, float]:
    if how == "none":
        return 1.0, 0.0
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.special import logsumexp  # type: ignore[import-untyped]

    def cost(values: npt.NDArray[np.float64]) -> float:
        scaled = logits * np.exp(values[0])
        if len(values) == 2:
            scaled[:, 1] += values[1]
        losses = logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]
        return float(losses.mean() + PENALTY * np.square(values).sum())

    start = np.zeros(2 if how == "platt" else 1)
    bounds = [tuple(np.log(SCALES)), (-20.0, 20.0)][: len(start)]
    found = minimize(cost, start, method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(found[0])), float(found[1]) if how == "platt" else 0.0


Counts = npt.NDArray[np.float64]
Score = Callable[[Counts, Counts, float, float], Counts]
"""(hits among the second class, false alarms, how many are of the second class, of the first)."""


def _f1(hits: Counts, wrong: Counts, positives: float, negatives: float) -> Counts:
    total: Counts = 2 * hits / np.maximum(hits + wrong + positives, 1)
    return total


def _f1_macro(hits: Counts, wrong: Counts, positives: float, negatives: float) -> Counts:
    rejected = negatives - wrong
    first = 2 * rejected / np.maximum(rejected + negatives + positives - hits, 1)
    return (_f1(hits, wrong, positives, negatives) + first) / 2


SCORES: dict[str, Score] = {
    "f1": _f1,
    "f1_macro": _f1_macro,
    "accuracy": lambda hits, wrong, positives, negatives: hits + negatives - wrong,
    "balanced_accuracy": lambda hits, wrong, positives, negatives: (
        hits / max(positives, 1) + (negatives - wrong) / max(negatives, 1)
    ),
}


def _threshold(second: npt.NDArray[np.float64], y: npt.NDArray[Any], score: Score) -> float:
    """The middle between two neighbouring probabilities where the score is best; of equally good
    ones that nearest to a half."""
    values = np.unique(second)
    if len(values) < 2:
        return 0.5
    candidates = (values[1:] + values[:-1]) / 2
    of_second, of_first = np.sort(second[y == 1]), np.sort(second[y == 0])
    hits = (len(of_second) - np.searchsorted(of_second, candidates, "right")).astype(np.float64)
    wrong = (len(of_first) - np.searchsorted(of_first, candidates, "right")).astype(np.float64)
    scores = score(hits, wrong, len(of_second), len(of_first))
    best = candidates[scores >= scores.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])
