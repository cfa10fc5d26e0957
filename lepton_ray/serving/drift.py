"""How far requests are from what a version was trained on: a share of values per column.

A number is strange outside the range of the training split, a category when it was not in it.
Images and texts are not looked at: an image out of range is refused, and a text has no range.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lepton_ray.data.schema import Schema
from lepton_ray.serving.requests import Columns

ROWS = 256  # of a request


def strange(schema: Schema, columns: Columns) -> Iterator[tuple[str, int, int]]:
    """(column, values, how many of them are strange) of every column that has a range."""
    for column in schema.columns:
        values = columns[column.name][:ROWS]
        if column.kind == "number" and column.low is not None and column.high is not None:
            numbers = values.astype(np.float64)
            number = int(((numbers < column.low) | (numbers > column.high)).sum())
        elif column.kind == "category":
            number = int((~np.isin(values.astype(str), column.categories)).sum())
        else:
            continue
        yield column.name, len(values), number
