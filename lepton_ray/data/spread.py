"""How far values are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDING = 32.0  # units in the last place of the largest value


def deviation(values: npt.NDArray[Any], axis: int | None = None) -> npt.NDArray[np.float64]:
    """Standard deviation; 0 where nothing but rounding makes values differ from their mean.

    NumPy's of a thousand times 0.1 is 1e-17, and one over that would be a scale.
    """
    found = np.asarray(values.std(axis=axis), np.float64)
    limit = ROUNDING * np.finfo(found.dtype if values.dtype.kind != "f" else values.dtype).eps
    least, most = values.min(axis=axis), values.max(axis=axis)
    differ = (least < most) & (found > limit * np.maximum(np.abs(least), np.abs(most)))
    return np.where(differ, found, 0.0)
