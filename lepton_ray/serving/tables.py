"""Rows of a table in a CSV, Parquet or Arrow body.

Parquet and Arrow are read in a `sandbox.Sandbox`; what leaves it is counted here before it is
made, since a text that is stored once may be named by every row.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lepton_ray.data.csvs import MISSING
from lepton_ray.data.schema import Schema
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import SHOWN, Problem, RowsError

Rows = list[dict[str, Any]]
NAMED = 20  # unknown columns that are told


def from_csv(schema: Schema, body: bytes, max_rows: int) -> Rows:
    """UTF-8 with a header line; commas, double quotes.

    Raises:
        RefusedError: 422 when it is no CSV, 413 for too many rows.
        RowsError: for unknown columns, and lines of another length.
    """
    kinds = {c.name: c.kind for c in schema.columns}
    rows: Rows = []
    try:
        reader = csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        names = _names(schema, next(reader, []))
        for cells in reader:
            if not cells:
                continue  # an empty line
            if len(cells) != len(names):
                rule = f"a line has {len(names)} cells, as the header has"
                raise RowsError([Problem(len(rows), "", rule, f"{len(cells)} cells")])
            if len(rows) == max_rows:
                raise too_many_rows(max_rows)
            rows.append(
                {name: value_of(kinds[name], cell) for name, cell in zip(names, cells, strict=True)}
            )
    except (csv.Error, UnicodeDecodeError) as error:
        raise RefusedError(422, f"the body must be CSV in UTF-8: {error}") from None
    return rows


def from_parquet(schema: Schema, body: bytes, max_rows: int, max_bytes: int) -> Rows:
    """A Parquet file.

    Args:
        max_bytes: that its texts may come to.

    Raises:
        RefusedError: 422 when it is no such file, 413 for too many rows or too long texts.
        RowsError: for unknown columns, and those of another type.
    """
    with _parsing("a Parquet file", max_bytes):
        file = pq.ParquetFile(pa.BufferReader(body))
        if file.metadata.num_rows > max_rows:
            raise too_many_rows(max_rows)
        _check(schema, file.schema_arrow)
        return _rows(file.iter_batches(batch_size=max_rows), max_rows, max_bytes)


def from_arrow(schema: Schema, body: bytes, max_rows: int, max_bytes: int) -> Rows:
    """An Arrow IPC stream.

    Raises:
        RefusedError, RowsError: see `from_parquet`.
    """
    with _parsing("an Arrow stream", max_bytes), pa.ipc.open_stream(body) as reader:
        _check(schema, reader.schema)
        return _rows(reader, max_rows, max_bytes)


def too_many_rows(max_rows: int) -> RefusedError:
    """More rows than ``serve.limits.rows``."""
    return RefusedError(413, f"a request has at most {max_rows} rows: send several requests")


def too_large(max_bytes: int) -> RefusedError:
    """More to unpack than ``serve.limits.decoded_mb``."""
    return RefusedError(413, f"a body unpacks to at most {max_bytes} bytes: send fewer rows")


def _names(schema: Schema, names: list[str]) -> list[str]:
    """
    Raises:
        RowsError: for columns that are unknown or named twice; missing ones are told per row.
    """
    known = {c.name for c in schema.columns}
    rule = f"no such field; known: {', '.join(sorted(known))}"
    # A body can have millions; among these are enough that are unknown, or one that is named twice.
    looked = names[: len(known) + NAMED]
    problems = [Problem(0, n[:SHOWN], rule, "a column") for n in looked if n not in known][:NAMED]
    if not problems and len(set(looked)) < len(looked):
        twice = next(n for n in looked if looked.count(n) > 1)
        problems = [Problem(0, twice, "a column is named once", "twice")]
    if problems or not names:
        raise RowsError(problems or [Problem(0, "", rule, "no columns")])
    return names


def value_of(kind: str, cell: str) -> Any:
    """What stands for nothing in a file to train on is a gap here; a text that is no number stays
    one, for the check of rows to name."""
    if kind in ("number", "date") and cell in MISSING:
        return None
    if kind != "number":
        return cell
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell


def _check(schema: Schema, given: pa.Schema) -> None:
    """
    Raises:
        RowsError: for unknown columns, and for types that are neither numbers nor plain texts.
    """
    _names(schema, given.names)
    problems = []
    dates = {c.name for c in schema.columns if c.kind == "date" and not c.format}
    for column in given:
        of = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pa.types.is_string(of) or pa.types.is_large_string(of)
        number = pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_boolean(of)
        number = number or pa.types.is_decimal(of)
        date = column.name in dates and pa.types.is_temporal(of)
        if not text and not date and not (number and not pa.types.is_dictionary(column.type)):
            rule = "a column holds numbers or texts"
            problems.append(Problem(0, column.name, rule, str(column.type)[:80]))
    if problems:
        raise RowsError(problems)


def _rows(batches: Any, max_rows: int, max_bytes: int) -> Rows:
    rows: Rows = []
    size = 0
    for batch in _valid(batches):
        if len(rows) + batch.num_rows > max_rows:
            raise too_many_rows(max_rows)
        size += sum(_text_bytes(column) for column in batch.columns)
        if size > max_bytes:
            raise too_large(max_bytes)
        rows += batch.to_pylist()
    return rows


def _valid(batches: Any) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        batch.validate(full=True)  # an offset beyond the end would read whatever lies there
        yield batch


def _text_bytes(column: pa.Array) -> int:
    if pa.types.is_dictionary(column.type):
        lengths = pc.binary_length(column.dictionary).cast("int64").take(column.indices)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.binary_length(column).cast("int64")
    else:
        return 0
    return pc.sum(lengths).as_py() or 0


@contextlib.contextmanager
def _parsing(what: str, max_bytes: int) -> Iterator[None]:
    """
    Raises:
        RefusedError: for whatever a parser raises, which for a damaged file can be nearly anything.
    """
    try:
        yield
    except (RefusedError, RowsError):
        raise
    except MemoryError:  # Arrow's is one of them
        raise too_large(max_bytes) from None
    except Exception as error:
        raise RefusedError(422, f"the body must be {what}: {_first(error)}") from None


def _first(error: BaseException) -> str:
    """The first line: what Arrow adds to it names its own source files."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
