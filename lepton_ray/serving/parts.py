"""The answers to a block of rows as a part of a file, and the file made of its parts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lepton_ray.data.schema import Schema
from lepton_ray.errors import DataError, InputError
from lepton_ray.serving import blocks
from lepton_ray.serving.answers import Answer, AnyAnswer, LabelsAnswer
from lepton_ray.serving.blocks import Block
from lepton_ray.serving.runtime import Runtime

FORMATS = (".jsonl", ".csv", ".parquet")
_TYPES: dict[str, dict[str, pa.DataType]] = {
    "regression": {"value": pa.float64()},
    "ranking": {"items": pa.list_(pa.string()), "scores": pa.list_(pa.float64())},
    "forecast": {"values": pa.list_(pa.float64())},
}
"""Columns of answers that are no classes; a list is a cell of JSON in a CSV."""


def answer_names(schema: Schema, suffix: str) -> list[str]:
    """What an answer's columns are called."""
    if schema.task in _TYPES:
        return list(_TYPES[schema.task])
    first = "labels" if schema.task == "multilabel" else "label"
    if suffix == ".jsonl":
        return [first, "probabilities"]
    return [first, *(f"probability_{name}" for name in schema.classes)]


def check_kept(schema: Schema, suffix: str, keep: Sequence[str]) -> None:
    """
    Raises:
        InputError: when a kept column and an answer's would have one name.
    """
    own = answer_names(schema, suffix)
    if both := sorted(set(keep) & set(own)):
        raise InputError(
            f"--keep {both[0]}: an answer has {both[0]!r} of its own; it holds {', '.join(own)}: "
            "rename the column, or leave it out"
        )


def lines(runtime: Runtime, block: Block, keep: Sequence[str]) -> Iterator[str]:
    """A JSON line for each row, without its end."""
    for kept, answer in _answered(runtime, block, keep):
        # ASCII: a kept text may hold half a surrogate pair, which UTF-8 cannot carry.
        yield json.dumps({**kept, **answer.model_dump()}, default=str)


def content(
    runtime: Runtime, block: Block, keep: Sequence[str], suffix: str, kept: pa.Schema | None
) -> bytes:
    """The part of a block.

    Args:
        kept: types of the kept columns; None to tell them from the values.

    Raises:
        DataError, RowsError: see `blocks.read`.
    """
    if suffix == ".jsonl":
        return "".join(line + "\n" for line in lines(runtime, block, keep)).encode()
    rows = [
        (*kept_row.values(), *_cells(answer))
        for kept_row, answer in _answered(runtime, block, keep)
    ]
    if suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(
            [json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in rows
        )
        return text.getvalue().encode("utf-8", "replace")
    return _parquet(runtime.schema, rows, kept, keep)


def join(
    parts: Iterable[Callable[[], bytes]],
    into: BinaryIO,
    schema: Schema,
    keep: Sequence[str],
    suffix: str,
) -> None:
    """The whole file; one part is in memory at a time.

    Args:
        parts: reads each.

    Raises:
        DataError: when a kept column has values of kinds that no type of Parquet holds together.
    """
    if suffix == ".parquet":
        empty = partial(_parquet, schema, [], None, keep)
        _join_parquet(list(parts) or [empty], into)
        return
    if suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow([*keep, *answer_names(schema, suffix)])
        into.write(text.getvalue().encode())
    for read in parts:
        into.write(read())


def _answered(
    runtime: Runtime, block: Block, keep: Sequence[str]
) -> Iterator[tuple[dict[str, Any], AnyAnswer]]:
    first = block.first
    for rows, kept in blocks.read(block, runtime.schema, keep):
        with blocks.numbered(first):
            answers = runtime.predict(rows)
        yield from zip(kept, answers, strict=True)
        first += len(rows)


def _cells(answer: AnyAnswer) -> tuple[Any, ...]:
    if isinstance(answer, Answer):
        return (answer.label, *answer.probabilities.values())
    if isinstance(answer, LabelsAnswer):
        return (answer.labels, *answer.probabilities.values())
    return tuple(answer.model_dump().values())


def _parquet(
    schema: Schema, rows: list[tuple[Any, ...]], kept: pa.Schema | None, keep: Sequence[str]
) -> bytes:
    names = answer_names(schema, ".parquet")
    first = pa.list_(pa.string()) if schema.task == "multilabel" else pa.string()
    types = list(_TYPES.get(schema.task, {}).values()) or [first, *[pa.float32()] * len(names[1:])]
    given = [kept.field(name).type for name in keep] if kept else [None] * len(keep)
    columns = list(zip(*rows, strict=True)) or [()] * len([*given, *types])
    try:
        arrays = [pa.array(c, t) for c, t in zip(columns, [*given, *types], strict=True)]
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(
            f"a kept column cannot be written to Parquet: {error}: write .jsonl"
        ) from error
    out = io.BytesIO()
    pq.write_table(pa.table(arrays, names=[*keep, *names]), out)
    return out.getvalue()


def _join_parquet(parts: list[Callable[[], bytes]], into: BinaryIO) -> None:
    try:
        schema = pa.unify_schemas(
            [pq.read_schema(pa.BufferReader(read())) for read in parts],
            promote_options="permissive",
        )
    except pa.ArrowException as error:
        raise DataError(
            f"a kept column has values of several kinds: {error}: write .jsonl"
        ) from error
    with pq.ParquetWriter(into, schema) as writer:
        for read in parts:
            writer.write_table(pq.read_table(pa.BufferReader(read())).cast(schema))
