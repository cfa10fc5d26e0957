"""Columns on disk, mapped into memory: in files without a name under ``$TMPDIR``, which are gone
when nobody looks at the columns any more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd


def table(schema: pa.Schema, parts: Iterable[pa.Table]) -> pa.Table:
    """The rows of all parts."""
    with tempfile.NamedTemporaryFile() as spill:
        with pa.ipc.new_file(spill, schema) as writer:
            for part in parts:
                writer.write_table(part)
        spill.flush()
        return pa.ipc.open_file(pa.memory_map(spill.name)).read_all()


def series(values: pa.ChunkedArray) -> pd.Series:
    """Numbers, with NaN for a gap, and texts; of other types in memory, as pandas has them."""
    import pandas as pd

    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return pd.Series(_numbers(values), copy=False)
    if pa.types.is_large_string(kind):
        one = pa.table({"": values})
        return texts(table(one.schema, [one]).column(0))
    return values.to_pandas()


def texts(values: pa.ChunkedArray) -> pd.Series:
    """Of large strings, which stay where they are."""
    import pandas as pd

    return pd.Series(pd.array(values, dtype="str"))


def _numbers(values: pa.ChunkedArray) -> npt.NDArray[Any]:
    """[n]"""
    gaps = pa.types.is_integer(values.type) and values.null_count
    dtype = np.dtype(np.float64 if gaps else values.type.to_pandas_dtype())
    if len(values) == 0:
        return np.zeros(0, dtype)
    with tempfile.TemporaryFile() as spill:
        for chunk in values.chunks:
            numbers = chunk.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
            spill.write(np.ascontiguousarray(numbers).data)
        spill.flush()
        return np.memmap(spill, dtype, "r", shape=(len(values),))
