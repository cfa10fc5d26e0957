"""CSV files of any size as columns that lie on disk and are mapped into memory.

They are read once, in pieces, into texts; then each column becomes what all of its texts are, in
all files. Both lie in files without a name under ``$TMPDIR``, see `mapped`.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from lepton_ray.data import mapped
from lepton_ray.data.files import check_same, naming, open_file, size_of
from lepton_ray.data.hands import Hands
from lepton_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

PIECE = 1 << 24  # bytes of a file that are read together, up to the next end of a row
BLOCK = 1 << 22  # bytes read at a time, in room for as many in each column; no row is longer
MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Cells that stand for nothing among numbers and dates, as pandas has it. Of a text only the empty
one does: NA is Namibia, too."""


@dataclass(frozen=True, kw_only=True)
class _File:
    path: str
    header: tuple[str, ...]
    columns: tuple[str, ...]
    """The same names, in the order in which they are wanted."""
    size: int


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Whole rows of a file."""

    file: _File
    start: int
    end: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    cells: pa.ChunkedArray
    keep_texts: bool
    """Whether they are texts whatever they look like."""
    code: bool
    """Whether 01 is another than 1."""


class _MisreadError(DataError):
    """A piece cannot be read as rows of the file."""


def read(
    paths: Sequence[str],
    texts: Collection[str],
    as_written: Collection[str],
    codes: Collection[str],
    hands: Hands,
) -> pd.DataFrame:
    """The rows of CSVs in UTF-8, with a header line; commas, double quotes.

    Args:
        paths: of files with the same columns, in any order, here or at a URI.
        texts: columns that are not looked at: every cell is the text it is.
        as_written: columns of texts in which a cell may be missing.
        codes: columns that are texts where a whole number begins with a zero.
        hands: for the pieces of the files, then for the columns.

    Raises:
        DataError: when one is not in UTF-8, a line has more or fewer cells than the header, a
            column is named twice, or the files have different columns.
    """
    import pandas as pd

    headers = {path: _header(path) for path in paths}
    columns = headers[paths[0]]
    for path, header in headers.items():
        check_same(paths[0], columns, path, header)
    files = [
        _File(path=path, header=header, columns=columns, size=size_of(path))
        for path, header in headers.items()
    ]
    table = _texts(files, hands)
    asked = {
        name: _Column(cells=table.column(at), keep_texts=name in as_written, code=name in codes)
        for at, name in enumerate(columns)
        if name not in texts
    }
    found = {name: mapped.texts(table.column(at)) for at, name in enumerate(columns)}
    typed = hands.map("columns", _typed, asked.values(), len(asked))
    for name, values in zip(asked, typed, strict=True):
        if values is not None:
            found[name] = mapped.series(values)
    return pd.DataFrame(found, copy=False)


def _header(path: str) -> tuple[str, ...]:
    with naming(path), open_file(path) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
        cells = next(csv.reader(lines), None)
    if not cells:
        raise DataError(f"{path}: is empty: a CSV starts with a line that names its columns")
    if broken := [cell for cell in cells if "\n" in cell or "\r" in cell]:
        raise DataError(f"{path}: the name of a column is one line, but {broken[0]!r} is more")
    header = tuple(cell or f"Unnamed: {at}" for at, cell in enumerate(cells))
    if twice := [cell for cell in header if header.count(cell) > 1]:
        raise DataError(f"{path}: a column is named once, but {twice[0]!r} is there twice")
    return header


def _texts(files: Sequence[_File], hands: Hands) -> pa.Table:
    """All cells as they are, mapped."""
    schema = pa.schema([(name, pa.large_string()) for name in files[0].columns])
    pieces = (piece for file in files for piece in _pieces(file))
    total = sum(max(1, round(file.size / PIECE)) for file in files)
    try:
        return mapped.table(schema, hands.map("parts of files", _rows, pieces, total))
    except _MisreadError:
        # A quote in the middle of a cell can mislead the search for the ends of rows, the cluster
        # may not have the file; and where that is wrong, this counts its lines.
        return mapped.table(schema, (part for file in files for part in _all_rows(file)))


def _pieces(file: _File) -> Iterator[_Piece]:
    """Cut at ends of lines that are outside of quotes."""
    with naming(file.path), open_file(file.path) as opened:
        start = at = 0
        quoted = False
        # In a file of one column a part of a cell would pass for a row.
        while len(file.header) > 1 and file.size - at > PIECE:
            block = opened.read(PIECE)
            end, within = len(block), quoted ^ bool(block.count(b'"') % 2)
            quoted = within
            while (line := block.rfind(b"\n", 0, end)) >= 0:
                within ^= bool(block.count(b'"', line, end) % 2)
                if not within:
                    yield _Piece(file=file, start=start, end=at + line + 1)
                    start = at + line + 1
                    break
                end = line
            at += len(block)
        yield _Piece(file=file, start=start, end=file.size)


def _rows(piece: _Piece) -> pa.Table:
    try:
        with open_file(piece.file.path, piece.file.size) as opened:
            content = pa.py_buffer(opened.read_at(piece.end - piece.start, piece.start))
        rows = _reader(pa.BufferReader(content), piece.file, header=not piece.start).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise _MisreadError(str(error)) from error
    return rows.select(piece.file.columns)


def _all_rows(file: _File) -> Iterator[pa.Table]:
    """Of a whole file, a few at a time.

    Raises:
        DataError: where they are none.
    """
    with naming(file.path), open_file(file.path) as opened:
        try:
            for batch in _reader(opened, file, header=True):
                yield pa.Table.from_batches([batch]).select(file.columns)
        except pa.ArrowInvalid as error:
            _check_utf8(file.path)
            raise DataError(f"{file.path}: {_told(error, file.header)}") from error


def _reader(opened: pa.NativeFile, file: _File, *, header: bool) -> pa_csv.CSVStreamingReader:
    """
    Args:
        header: whether the first line names the columns.
    """
    return pa_csv.open_csv(
        opened,
        pa_csv.ReadOptions(
            use_threads=False, block_size=BLOCK, column_names=file.header, skip_rows=int(header)
        ),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(file.header, pa.large_string()), strings_can_be_null=False
        ),
    )


def _typed(column: _Column) -> pa.ChunkedArray | None:
    """Whole numbers, numbers, truth values or texts: the first of which all cells are; None where
    they stay as they are."""
    cells = column.cells
    as_texts = _without(cells, ("",))
    if column.keep_texts or (column.code and _any_code(cells)):
        return as_texts
    numbers = _without(cells, MISSING)
    trimmed = pc.utf8_trim_whitespace(cells if numbers is None else numbers)
    for kind in (pa.int64(), pa.float64()):
        try:
            found = trimmed.cast(kind)
        except pa.ArrowInvalid:
            continue
        if not found.null_count:
            return found
        try:
            return found.cast(pa.float64())  # which has gaps
        except pa.ArrowInvalid:
            return as_texts  # no float holds whole numbers as large as these
    lower = pc.utf8_lower(trimmed)
    if not lower.null_count and pc.all(pc.is_in(lower, pa.array(["true", "false"]))).as_py():
        return pc.equal(lower, "true")
    return as_texts


def _any_code(cells: pa.ChunkedArray) -> bool:
    found: bool | None = pc.any(pc.match_substring_regex(cells, r"^\s*0\d+\s*$")).as_py()
    return bool(found)


def _without(cells: pa.ChunkedArray, gaps: Sequence[str]) -> pa.ChunkedArray | None:
    """With nothing in the place of some cells; None where there are none of them."""
    missing = pc.is_in(cells, value_set=pa.array(gaps, pa.large_string()))
    if not pc.any(missing).as_py():
        return None
    return pc.if_else(missing, pa.scalar(None, pa.large_string()), cells)


def _check_utf8(path: str) -> None:
    """
    Raises:
        UnicodeDecodeError: where it is not, for `naming`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_file(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            decoder.decode(block)
        decoder.decode(b"", final=True)


def _told(error: Exception, header: Sequence[str]) -> str:
    text = str(error).splitlines()[0]
    if "Expected" in text and "columns" in text:
        return (
            f"every line has {len(header)} cells, as the header has, but {text}: put cells with "
            'commas into double quotes ("), or repair the line'
        )
    return f"cannot be read: {text}"
