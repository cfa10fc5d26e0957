"""Sources, splits, fitted preprocessing, and the order of samples."""

from collections.abc import Sequence

from lepton_ray.config.schema import Data, ImageData, InteractionData, SeriesData, TextData
from lepton_ray.data import dataset, pretrained
from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.fitted import Fitted
from lepton_ray.data.hands import Hands
from lepton_ray.data.interactions.load import load as _load_interactions
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Column, Schema
from lepton_ray.data.series.load import load as _load_series
from lepton_ray.errors import DataError, ExperimentError

__all__ = ["Column", "Dataset", "Fitted", "Preprocess", "Samples", "Schema", "load"]


def load(
    data: Data, sliced: Sequence[str] = (), model: str = "", hands: Hands | None = None
) -> Dataset:
    """Read, split, fit the preprocessing on the training split, apply it to all.

    Args:
        sliced: columns to group the test split by, as ``evaluate.slices`` says.
        model: ``model.name``; a pretrained one prepares the data as it was trained on its own.
        hands: for many rows; this process without.

    Raises:
        ExperimentError: for a pretrained model that is not there, or data it is not for.
        DataError: see `dataset.load`, `interactions.load` and `series.load`.
    """
    if sliced and isinstance(data, InteractionData | SeriesData):
        raise DataError(
            f"evaluate.slices groups rows of tables and texts, but data.kind is {data.kind}: leave "
            "it out"
        )
    given = None
    if pretrained.is_pretrained(model):
        if not isinstance(data, TextData | ImageData):
            said = f"model.name: {model!r} is a model of texts or images, but data.kind is "
            raise ExperimentError("experiment", [f"{said}{data.kind}: set another model"])
        given = pretrained.read(model, data.kind)
    if isinstance(data, InteractionData):
        return _load_interactions(data, hands)
    if isinstance(data, SeriesData):
        return _load_series(data, hands)
    return dataset.load(data, sliced, given, hands)
