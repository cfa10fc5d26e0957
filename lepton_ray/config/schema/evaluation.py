"""How a version's probabilities become answers, and on whom it is measured apart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lepton_ray.config.schema.section import Section


class Evaluate(Section):
    calibrate: Literal["none", "temperature", "platt"] = "none"
    """Fitted on the validation split: one factor of all logits, or for two classes a factor and a
    shift, which also takes back what ``train.class_weights`` did; of labels, for each its own."""
    threshold: (
        Annotated[float, Field(gt=0, lt=1)]
        | Literal["f1", "f1_macro", "accuracy", "balanced_accuracy"]
    ) = 0.5
    """Of two classes, the probability of the second from which on it is the answer: a number, or
    the one with the best such score on the validation split. Of labels, for each the probability
    from which on a row has it."""
    slices: tuple[str, ...] = ()
    """Columns of a table or of texts, of whose values each gets metrics of its own."""
