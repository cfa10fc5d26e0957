"""Parquet files of any size as columns on disk, see `mapped`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data import mapped
from lepton_ray.data.files import check_same, naming, open_file
from lepton_ray.data.hands import Hands
from lepton_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A row group of a file, and what its columns are in all files together."""

    path: str
    size: int
    """Bytes of the file."""
    number: int
    schema: pa.Schema


def read(paths: Sequence[str], hands: Hands) -> pd.DataFrame:
    """The rows of files with the same columns.

    Args:
        paths: here or at a URI.
        hands: for the row groups.

    Raises:
        DataError: when one cannot be read, the files have different columns, or a column is of
            types that have nothing in common.
    """
    import pandas as pd

    schemas: dict[str, pa.Schema] = {}
    files: list[tuple[str, int, int]] = []
    for path in paths:
        with naming(path), open_file(path) as file:
            parquet = pq.ParquetFile(file)
            schemas[path] = _plain(parquet.schema_arrow)
            files.append((path, file.size(), parquet.num_row_groups))
    schema = schemas[paths[0]]
    for path, found in schemas.items():
        check_same(paths[0], schema.names, path, found.names)
        schema = _together(schema, found, paths[0], path)
    groups = [
        _Group(path=path, size=size, number=number, schema=schema)
        for path, size, count in files
        for number in range(count)
    ]
    try:
        table = mapped.table(schema, hands.map("row groups", _rows, groups, len(groups)))
    except DataError:  # a file that is here may not be elsewhere
        table = mapped.table(schema, map(_rows, groups))
    return pd.DataFrame(
        {
            name: mapped.texts(values)
            if pa.types.is_large_string(values.type)
            else mapped.series(values)
            for name, values in zip(table.column_names, table.columns, strict=True)
        },
        copy=False,
    )


def _plain(schema: pa.Schema) -> pa.Schema:
    """Texts of one type however they are stored, and no index of a data frame."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    return pa.schema(
        [(field.name, _type(field.type)) for field in schema if field.name not in index]
    )


def _type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_decimal(kind):
        return pa.float64()
    return pa.large_string() if pa.types.is_string(kind) else kind


def _together(schema: pa.Schema, other: pa.Schema, first: str, path: str) -> pa.Schema:
    fields = []
    for field in schema:
        try:
            both = pa.unify_schemas(
                [pa.schema([field]), pa.schema([other.field(field.name)])],
                promote_options="permissive",
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise DataError(
                f"{path}: column {field.name!r} is {other.field(field.name).type}, but in {first} "
                f"{field.type}: write them as one type"
            ) from None
        fields.append(both.field(0))
    return pa.schema(fields)


def _rows(group: _Group) -> pa.Table:
    with naming(group.path), open_file(group.path, group.size) as file:
        names = group.schema.names
        rows = pq.ParquetFile(file).read_row_group(group.number, columns=names, use_threads=False)
        return rows.select(names).replace_schema_metadata().cast(group.schema)
