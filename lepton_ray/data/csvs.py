"""A CSV file of any size as columns that lie on disk and are mapped into memory.

It is read once, in blocks, into texts; then each column becomes what all of its texts are. Both lie
in files without a name under ``$TMPDIR``, which are gone when nobody looks at the columns any more.
"""

from __future__ import annotations

import codecs
import csv
import io
import tempfile
from collections.abc import Callable, Collection
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from lepton_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Open = Callable[[], Any]
BLOCK = 1 << 22  # bytes read at a time, in room for as many in each column; no row is longer
MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Cells that stand for nothing, as pandas has it."""


def read(
    name: str, open_file: Open, texts: Collection[str], as_written: Collection[str]
) -> pd.DataFrame:
    """The rows of a CSV in UTF-8, with a header line; commas, double quotes.

    Args:
        name: for messages.
        open_file: opens it anew, as bytes.
        texts: columns that are not looked at: every cell is the text it is.
        as_written: columns of texts in which a cell may be missing.

    Raises:
        DataError: when it is not in UTF-8, a line has more or fewer cells than the header, or a
            column is named twice.
    """
    import pandas as pd

    header = _header(name, open_file)
    try:
        table = _texts(open_file, header)
    except pa.ArrowInvalid as error:
        _check_utf8(open_file)
        raise DataError(f"{name}: {_told(error, header)}") from error
    with tempfile.TemporaryFile() as spill:
        columns = {}
        for position, column in enumerate(header):
            cells = table.column(position)
            if column in texts:
                columns[column] = pd.Series(pd.array(cells, dtype="str"))
            else:
                columns[column] = _typed(cells, spill, keep_texts=column in as_written)
        return pd.DataFrame(columns, copy=False)


def _header(name: str, open_file: Open) -> list[str]:
    with open_file() as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
        cells = next(csv.reader(lines), None)
    if not cells:
        raise DataError(f"{name}: is empty: a CSV starts with a line that names its columns")
    header = [cell or f"Unnamed: {at}" for at, cell in enumerate(cells)]
    if twice := [cell for cell in header if header.count(cell) > 1]:
        raise DataError(f"{name}: a column is named once, but {twice[0]!r} is there twice")
    return header


def _texts(open_file: Open, header: list[str]) -> pa.Table:
    """All cells as they are, mapped."""
    with open_file() as file:
        reader = pa_csv.open_csv(
            file,
            pa_csv.ReadOptions(
                use_threads=False, block_size=BLOCK, column_names=header, skip_rows=1
            ),
            pa_csv.ParseOptions(newlines_in_values=True),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.large_string()), strings_can_be_null=False
            ),
        )
        with tempfile.NamedTemporaryFile() as spill:
            with pa.ipc.new_file(spill, reader.schema) as writer:
                for batch in reader:
                    writer.write_batch(batch)
            spill.flush()
            return pa.ipc.open_file(pa.memory_map(spill.name)).read_all()


def _typed(cells: pa.ChunkedArray, spill: IO[bytes], *, keep_texts: bool) -> pd.Series:
    """Whole numbers, numbers, truth values or texts: the first of which all cells are."""
    import pandas as pd

    missing = pc.is_in(cells, value_set=pa.array(MISSING, pa.large_string()))
    present = cells  # mapped, where none is missing
    if pc.any(missing).as_py():
        present = pc.if_else(missing, pa.scalar(None, pa.large_string()), cells)
    if not keep_texts:
        trimmed = pc.utf8_trim_whitespace(present)
        for kind in (pa.int64(), pa.float64()):
            try:
                found = trimmed.cast(kind)
            except pa.ArrowInvalid:
                continue
            if found.null_count and kind == pa.int64():
                found = found.cast(pa.float64())
            return pd.Series(_mapped(found, spill), copy=False)
        if pc.all(pc.is_in(pc.utf8_lower(trimmed), pa.array(["true", "false"]))).as_py() and (
            not trimmed.null_count
        ):
            truth = pc.equal(pc.utf8_lower(trimmed), "true")
            return pd.Series(truth.to_numpy(), dtype=bool)
    return pd.Series(pd.array(present, dtype="str"))


def _mapped(found: pa.ChunkedArray, spill: IO[bytes]) -> npt.NDArray[Any]:
    """[n] Numbers, NaN for a gap; on disk, behind what is there already."""
    dtype = np.dtype(np.int64 if found.type == pa.int64() else np.float64)
    if len(found) == 0:
        return np.zeros(0, dtype)
    start = spill.tell()
    for chunk in found.chunks:
        numbers = chunk.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        spill.write(np.ascontiguousarray(numbers).data)
    spill.flush()
    return np.memmap(spill, dtype, "r", offset=start, shape=(len(found),))


def _check_utf8(open_file: Open) -> None:
    """
    Raises:
        UnicodeDecodeError: where it is not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_file() as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            decoder.decode(block)
        decoder.decode(b"", final=True)


def _told(error: Exception, header: list[str]) -> str:
    text = str(error).splitlines()[0]
    if "Expected" in text and "columns" in text:
        return (
            f"every line has {len(header)} cells, as the header has, but {text}: put cells with "
            'commas into double quotes ("), or repair the line'
        )
    return f"cannot be read: {text}"
