"""Groups of test samples that are measured apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import Source
from lepton_ray.data.tables import as_texts
from lepton_ray.errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

Groups = dict[str, npt.NDArray[np.str_]]
"""Column -> [n] the group of each sample."""
MOST = 12  # groups of a column; the rarer ones are one
FEW = 8  # distinct numbers that each are a group; of more, each quarter of the rows is one
OTHERS = "(others)"
NONE = "(none)"


def read(source: Source, frame: pd.DataFrame, names: Sequence[str]) -> Groups:
    """The groups of every row, by the columns that ``evaluate.slices`` names.

    Raises:
        DataError: for a column that is not there.
    """
    found: Groups = {}
    for name in names:
        if name not in frame.columns:
            raise DataError(
                f"{source}: evaluate.slices: no column {name!r}, "
                f"{nearest(name, map(str, frame.columns))}"
            )
        found[name] = _groups(frame[name])
    return found


def _groups(values: pd.Series) -> npt.NDArray[np.str_]:
    import pandas as pd

    if (
        pd.api.types.is_numeric_dtype(values)
        and not pd.api.types.is_bool_dtype(values)
        and values.nunique() > FEW
    ):
        quarters = pd.qcut(values, 4, duplicates="drop", precision=4)
        texts = quarters.astype(object).map(str, na_action="ignore").fillna("").to_numpy(object)
    else:
        texts = as_texts(values)
    names, inverse, counts = np.unique(
        texts.astype(np.str_), return_inverse=True, return_counts=True
    )
    names = np.where(names == "", NONE, names).astype(np.str_)
    if len(names) > MOST:
        rare = np.argsort(-counts, kind="stable")[MOST - 1 :]
        names = names.astype(object)
        names[rare] = OTHERS
        names = names.astype(np.str_)
    groups: npt.NDArray[np.str_] = names[inverse]
    return groups
