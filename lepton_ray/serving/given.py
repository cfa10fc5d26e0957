"""Rows as Python programs have them: mappings, a data frame, or an array. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lepton_ray.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Rows: TypeAlias = Sequence[Mapping[str, Any]] | pd.DataFrame | np.ndarray[Any, Any]


def as_rows(rows: Rows, columns: Callable[[], Sequence[str]]) -> list[Any]:
    """A list of rows, not yet checked.

    Args:
        rows: mappings of column name to value; or a data frame; or an array, of images [n, height,
            width(, channels)], or [n, columns] of numbers in the model's order.
        columns: of the model, by name; asked for an array only.

    Raises:
        InputError: for a text or a file, and an array of another shape.
    """
    given: Any = rows  # what it is shows in what it can do: neither pandas nor NumPy is loaded here
    if isinstance(given, str | bytes | Mapping):
        raise InputError(
            f"rows are a list, as [{{name: value}}], a data frame or an array, but got one "
            f"{type(given).__name__}"
        )
    if hasattr(given, "to_dict"):  # a data frame; pandas need not be there to find out
        found: list[Any] = given.to_dict("records")
        return found
    if not hasattr(given, "ndim"):
        return list(given)
    names = columns()
    if given.ndim > 2 and len(names) == 1:
        return [{names[0]: image} for image in given]
    if given.ndim == 2 and given.shape[1] == len(names):
        return [dict(zip(names, row, strict=True)) for row in given.tolist()]
    wanted = f"[n, {len(names)}] of {', '.join(names)}"
    if len(names) == 1:
        wanted += f", or [n, height, width] where {names[0]} is an image"
    raise InputError(f"an array must be {wanted}, but has shape {list(given.shape)}")
