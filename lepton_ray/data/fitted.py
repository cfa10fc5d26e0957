"""What is fitted on the training split and travels with every version, for all kinds of data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.data.preprocess import Inputs, Preprocess
from lepton_ray.data.schema import Column
from lepton_ray.data.series.fit import SeriesFit


class Fitted(Protocol):
    """From the columns of a request to one tensor a sample, and from a model's outputs back."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What a row holds."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample for the model."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the data tell a model besides, as arguments by name (`models.FACTS`)."""

    @property
    def target_deviation(self) -> float:
        """What a difference of answers is measured in; 1 for classes and scores."""

    def apply(self, columns: Mapping[str, Any]) -> Inputs:
        """[n, *input_shape] from column name -> [n, ...] values."""

    def restore(self, outputs: npt.NDArray[np.floating], x: Inputs) -> npt.NDArray[np.floating]:
        """[n, outputs] A model's outputs in the target's unit; `x` is what it was given."""

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""


def load(folder: Path) -> Fitted:
    """Read what ``save`` wrote."""
    kind = json.loads((folder / "preprocess.json").read_text()).get("kind")
    if kind == "interactions":
        return InteractionFit.load(folder)
    if kind == "series":
        return SeriesFit.load(folder)
    return Preprocess.load(folder)
