"""Files of rows or pictures, a block at a time: never more of them in memory than a few rows.

A block says where its rows are found again, so that it can be read in any process. Cells become
values as they do in a request's body: what HTTP answers to a row, a file's same row is answered.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lepton_ray import storage
from lepton_ray.data import folders
from lepton_ray.data.frames import SUFFIXES, json_row
from lepton_ray.data.images import FORMATS, ImageError
from lepton_ray.data.schema import Column, Schema
from lepton_ray.errors import DataError, InputError, nearest
from lepton_ray.serving import images, tables
from lepton_ray.serving.bodies import decoded
from lepton_ray.serving.requests import RowsError

ROWS = 1 << 16  # of a block
BYTES = 1 << 25  # of a block, where lines are long
PICTURES = 1 << 10  # of a block
CHUNK = 256  # rows held at a time
FILE = "file"  # what a picture is called in the answers

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Block:
    paths: tuple[str, ...]
    """The file of its rows, or its pictures."""
    first: int
    """Number of its first row in the file."""
    rows: int
    start: int = 0
    end: int = 0
    """Bytes of a file of lines; row groups of a Parquet file."""
    skip: int = 0
    """Rows of its first row group that are another block's."""
    header: tuple[str, ...] = ()
    """Names of a CSV's columns."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be predicted."""

    blocks: tuple[Block, ...]
    files: tuple[tuple[str, int, int], ...]
    """Path, bytes and time of change (ns) of every file."""
    kept: pa.Schema | None
    """Types of the kept columns where the files know them."""
    pictures: bool = False

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)


def find(schema: Schema, given: Sequence[str], keep: Sequence[str]) -> Source:
    """The blocks of files of rows and folders of such, or, for a model of images, of pictures.

    Args:
        keep: columns that the answers are given beside.

    Raises:
        DataError, InputError: when they cannot be read, or hold none, or lack a kept column.
    """
    if schema.columns[0].kind == "image":
        kinds = set(map(_is_pictures, given))
        if len(kinds) > 1:
            raise InputError("pictures and files of rows are predicted apart, but got both")
        if kinds == {True}:
            if keep:
                raise InputError("--keep names columns of a file of rows, but pictures have none")
            return _pictures([Path(path) for path in given])
    paths = [path for name in given for path in _files(name)]
    blocks: list[Block] = []
    files = []
    kept: list[pa.Schema] = []
    for path in paths:
        with _reading(path):
            filesystem, at = storage.open_folder(path)
            info = filesystem.get_file_info(at)
            if info.type is not pafs.FileType.File:
                raise DataError(f"{path!r} does not exist (looked in {Path.cwd()})")
            files.append((path, info.size, info.mtime_ns or 0))
            with filesystem.open_input_file(at) as file:
                found = list(_blocks(path, file))
            with filesystem.open_input_file(at) as file:
                names = _names(path, file)
        for name in keep:
            if names is not None and name not in names:
                raise DataError(f"{path}: no column {name!r} to keep, {nearest(name, names)}")
        if path.endswith(".parquet") and names is not None:
            kept.append(pa.schema([(name, names[name]) for name in keep]))
        blocks += found
    return Source(
        blocks=tuple(blocks),
        files=tuple(files),
        kept=kept[0] if kept and len(kept) == len(paths) and set(kept) == {kept[0]} else None,
    )


def read(block: Block, schema: Schema, keep: Sequence[str]) -> Iterator[tuple[Rows, Rows]]:
    """Some rows at a time as the model takes them, and beside each what is kept of it.

    Raises:
        DataError: when they cannot be read.
        RowsError: for a picture that is none, naming the row.
    """
    taken = {column.name: column for column in schema.columns}
    if not block.paths[0].endswith(SUFFIXES):
        yield from _decoded_pictures(block, schema.columns[0])
        return
    first = block.first
    for rows in _chunks(block, taken, keep):
        kept = [{name: row.get(name) for name in keep} for row in rows]
        given = [{name: value for name, value in row.items() if name in taken} for row in rows]
        with numbered(first):
            if any(column.kind == "image" for column in schema.columns):
                given = decoded(schema, given)
            yield given, kept
        first += len(rows)


def check_output(output: str | None, given: Sequence[str]) -> None:
    """What is written is not what is read, nor would be the next time.

    Raises:
        InputError: for an output that is one of the files, or in one of the folders.
    """
    if output is None:
        return
    for name in given:
        if storage.is_uri(name) or storage.is_uri(output):
            inside = output == name or output.startswith(f"{name.rstrip('/')}/")
        else:
            inside = Path(output).resolve().is_relative_to(Path(name).resolve())
        if inside:
            raise InputError(
                f"the output {output!r} would take the place of its input, or be read with it the "
                f"next time: write it outside of {name!r}"
            )


@contextlib.contextmanager
def numbered(first: int) -> Iterator[None]:
    """Problems of rows are told with the row's number in the file, where ``first`` is the first."""
    try:
        yield
    except RowsError as error:
        raise RowsError([problem.behind(first) for problem in error.problems]) from None


def _is_pictures(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return not _row_files(path) or bool(folders.find(path)[0])
    return path.suffix.lower() in folders.SUFFIXES


def _row_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.suffix in SUFFIXES)


def _files(name: str) -> list[str]:
    if not storage.is_uri(name) and Path(name).is_dir():
        inside = _row_files(Path(name))
        if not inside:
            raise DataError(f"{name}: must hold files of rows ({', '.join(SUFFIXES)})")
        return inside
    if not name.endswith(SUFFIXES):
        raise DataError(
            f"{name!r} must end with {', '.join(SUFFIXES)}, be a folder of such files or, for a "
            "model of images, a picture or a folder of pictures"
        )
    return [name]


def _pictures(given: list[Path]) -> Source:
    paths: list[Path] = []
    for path in given:
        inside = folders.find(path)[0] if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: must hold pictures ({', '.join(FORMATS)}), but holds none")
        paths += inside
    files = []
    for path in paths:
        with _reading(str(path)):
            stat = path.stat()
        files.append((str(path), stat.st_size, stat.st_mtime_ns))
    blocks = [
        Block(
            paths=tuple(map(str, paths[at : at + PICTURES])),
            first=at,
            rows=len(paths[at : at + PICTURES]),
        )
        for at in range(0, len(paths), PICTURES)
    ]
    return Source(blocks=tuple(blocks), files=tuple(files), kept=None, pictures=True)


def _decoded_pictures(block: Block, column: Column) -> Iterator[tuple[Rows, Rows]]:
    for at in range(0, len(block.paths), CHUNK):
        some = block.paths[at : at + CHUNK]
        rows = []
        for path in some:
            with _reading(path):
                content = Path(path).read_bytes()
            try:
                rows.append({column.name: images.decode(column, content, FORMATS)})
            except ImageError as error:
                raise DataError(f"{path}: {error}: repair it or take it out") from error
        yield rows, [{FILE: path} for path in some]


def _blocks(path: str, file: pa.NativeFile) -> Iterator[Block]:
    if path.endswith(".parquet"):
        return _parquet_blocks(path, pq.ParquetFile(file).metadata)
    lines = _Lines(file)
    if path.endswith(".jsonl"):
        return _line_blocks(path, lines, (line for line in lines if line.strip()), ())
    reader = csv.reader(lines.texts(path), strict=True)
    header = tuple(next(reader, ()))
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: a column is named once, but {twice[0]!r} is there twice")
    return _line_blocks(path, lines, (cells for cells in reader if cells), header)


def _line_blocks(
    path: str, lines: _Lines, rows: Iterator[Any], header: tuple[str, ...]
) -> Iterator[Block]:
    start, first, count = lines.at, 0, 0
    for _ in rows:
        count += 1
        if count == ROWS or lines.at - start >= BYTES:
            yield Block(
                paths=(path,), first=first, rows=count, start=start, end=lines.at, header=header
            )
            start, first, count = lines.at, first + count, 0
    if count:
        yield Block(
            paths=(path,), first=first, rows=count, start=start, end=lines.at, header=header
        )


def _parquet_blocks(path: str, metadata: pq.FileMetaData) -> Iterator[Block]:
    """Of whole row groups; of a part of one that is large."""
    first = start = count = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if count and count + rows > ROWS:
            yield Block(paths=(path,), first=first, rows=count, start=start, end=group)
            first, start, count = first + count, group, 0
        for skip in range(0, rows, ROWS) if rows > ROWS else ():
            part = min(ROWS, rows - skip)
            yield Block(
                paths=(path,), first=first, rows=part, start=group, end=group + 1, skip=skip
            )
            first, start = first + part, group + 1
        count += rows if rows <= ROWS else 0
    if count:
        yield Block(
            paths=(path,), first=first, rows=count, start=start, end=metadata.num_row_groups
        )


def _names(path: str, file: pa.NativeFile) -> dict[str, Any] | None:
    """The columns, of Parquet with their types; None for JSON, which names them in each row."""
    if path.endswith(".parquet"):
        return {field.name: field.type for field in pq.ParquetFile(file).schema_arrow}
    if path.endswith(".jsonl"):
        return None
    return dict.fromkeys(next(csv.reader(_Lines(file).texts(path), strict=True), []))


def _chunks(block: Block, taken: Mapping[str, Column], keep: Sequence[str]) -> Iterator[Rows]:
    (path,) = block.paths
    with _reading(path):
        filesystem, at = storage.open_folder(path)
        with filesystem.open_input_file(at) as file:
            if path.endswith(".parquet"):
                yield from _parquet_rows(file, block, {*taken, *keep})
                return
            lines = _Lines(file, block.start, block.end)
            rows = (
                _json_rows(path, lines, block.first)
                if path.endswith(".jsonl")
                else _csv_rows(path, lines, block, taken)
            )
            chunk: Rows = []
            for row in rows:
                chunk.append(row)
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk


def _parquet_rows(file: pa.NativeFile, block: Block, names: Collection[str]) -> Iterator[Rows]:
    parquet = pq.ParquetFile(file)
    columns = [name for name in parquet.schema_arrow.names if name in names]
    groups = list(range(block.start, block.end))
    skip, left = block.skip, block.rows
    for batch in parquet.iter_batches(CHUNK, groups, columns=columns, use_threads=False):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        some = batch.slice(skip, left)
        skip, left = 0, left - some.num_rows
        # A file without any of the columns has rows nevertheless, for the check to name.
        yield some.to_pylist() if columns else [{} for _ in range(some.num_rows)]
        if not left:
            return


def _json_rows(path: str, lines: _Lines, first: int) -> Iterator[dict[str, Any]]:
    """Through the parser of HTTP's bodies: others round numbers, or drop half a surrogate pair."""
    filled = (line for line in lines if line.strip())
    for number, line in enumerate(filled, first):
        yield json_row(line, f"{path}: row {number}")


def _csv_rows(
    path: str, lines: _Lines, block: Block, taken: Mapping[str, Column]
) -> Iterator[dict[str, Any]]:
    kinds = {name: column.kind for name, column in taken.items()}
    header, number = block.header, block.first
    for cells in csv.reader(lines.texts(path), strict=True):
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}: row {number} must have {len(header)} cells, as the header has, but has "
                f"{len(cells)}"
            )
        yield {
            name: tables.value_of(kinds.get(name, ""), cell)
            for name, cell in zip(header, cells, strict=True)
        }
        number += 1


class _Lines:
    """The lines of a part of a file, and how far they have been read."""

    def __init__(self, file: pa.NativeFile, start: int = 0, end: int | None = None) -> None:
        file.seek(start)
        self._file = io.BufferedReader(file, 1 << 20)
        self._end = end
        self.at = start

    def __iter__(self) -> Iterator[bytes]:
        while self._end is None or self.at < self._end:
            line = self._file.readline()
            if not line:
                return
            bare = line.removeprefix(b"\xef\xbb\xbf") if self.at == 0 else line
            self.at += len(line)
            yield bare

    def texts(self, path: str) -> Iterator[str]:
        for line in self:
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: must be in UTF-8, but has byte 0x{error.object[error.start]:02x} "
                    f"({error.reason}): save it as UTF-8, or convert it with iconv -t utf-8"
                ) from error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (csv.Error, OSError, pa.ArrowInvalid) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read: {reason}") from error
