"""Rows from files, or from a person's own function, as one data frame."""

from __future__ import annotations

import fnmatch
import importlib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from lepton_ray import storage
from lepton_ray.config.schema import Source
from lepton_ray.data import csvs, files, parquets
from lepton_ray.data.hands import Hands, Own, enough
from lepton_ray.errors import DataError, StoreError

if TYPE_CHECKING:
    import pandas as pd

SKLEARN = "sklearn:"
SKLEARN_TABLES = ("breast_cancer", "diabetes", "iris", "wine")
SUFFIXES = (".csv", ".parquet", ".jsonl")
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")
PATTERN = re.compile(r"[*?\[]")


def read(
    source: Source,
    texts: Collection[str] = (),
    as_written: Collection[str] = (),
    codes: Collection[str] = (),
    hands: Hands | None = None,
) -> pd.DataFrame:
    """The rows of all that a source names, one after the other.

    Args:
        texts: columns whose cells are texts as they stand, also ``123``, ``NA`` and nothing, which
            a CSV cannot tell from numbers and missing values.
        as_written: columns of a CSV whose cells are texts, also ``0123``, or missing.
        codes: columns of a CSV that are texts if a whole number in them begins with a zero.
        hands: for large CSV and Parquet files.

    Several files are of the columns of the first. CSVs together, and Parquet files, are as one that
    holds all of their rows, on disk; what else is named together is put together in memory.

    Raises:
        DataError: when something is missing, of another kind, or cannot be read, or the files have
            different columns.
    """
    named = (source,) if isinstance(source, str) else source
    found = [(one, find(one) if _is_files(one) else None) for one in named]
    paths = [path for _, some in found for path in some or ()]
    hands = enough(sum(map(files.size_of, paths)), hands or Own())
    if all(some is not None for _, some in found):
        if all(path.endswith(".csv") for path in paths):
            return _with_texts(csvs.read(paths, texts, as_written, codes, hands), texts)
        if all(path.endswith(".parquet") for path in paths):
            return _with_texts(parquets.read(paths, hands), texts)
    return _with_texts(_one_after_the_other(found, texts, as_written, codes, hands), texts)


def _is_files(source: str) -> bool:
    return not source.startswith(SKLEARN) and not FUNCTION.fullmatch(source)


def _one_after_the_other(
    found: Sequence[tuple[str, list[str] | None]],
    texts: Collection[str],
    as_written: Collection[str],
    codes: Collection[str],
    hands: Hands,
) -> pd.DataFrame:
    """Of several kinds, in memory.

    Args:
        found: each source and its files, where it has any.
    """
    import pandas as pd

    frames: dict[str, pd.DataFrame] = {}
    for one, paths in found:
        if one.startswith(SKLEARN):
            frames[one] = sklearn_table(one.removeprefix(SKLEARN))
        elif paths is None:
            frames[one] = _called(one)
        for path in paths or ():
            if path.endswith(".csv"):
                frames[path] = csvs.read([path], texts, as_written, codes, hands)
            elif path.endswith(".parquet"):
                frames[path] = parquets.read([path], hands)
            else:
                with files.naming(path):
                    frames[path] = pd.DataFrame(_json_lines(path))
    (first, whole), *others = frames.items()
    for path, frame in others:
        files.check_same(first, whole.columns, path, frame.columns)
    return pd.concat(list(frames.values()), ignore_index=True) if others else whole


def find(source: str) -> list[str]:
    """The files that a path, a pattern or a folder names, here or at a URI, sorted.

    Raises:
        DataError: when there are none, or one that cannot be read.
    """
    try:
        filesystem, at = storage.open_folder(source)
    except StoreError as error:
        raise DataError(f"{source!r} cannot be opened: {error}") from error
    start = source.removesuffix(at) if storage.is_uri(source) else ""
    try:
        info = filesystem.get_file_info(at)
        if info.type is pafs.FileType.File:
            if not at.endswith(SUFFIXES):
                raise DataError(f"{source!r} must end with {', '.join(SUFFIXES)}")
            return [source]
        if info.type is pafs.FileType.Directory:
            paths = _inside(filesystem, at)
        elif PATTERN.search(at):
            base = at[: PATTERN.search(at).start()].rpartition("/")[0]  # type: ignore[union-attr]
            paths = [path for path in _inside(filesystem, base) if fnmatch.fnmatchcase(path, at)]
        else:
            raise DataError(f"{source!r} does not exist (looked in {Path.cwd()})")
    except OSError as error:
        raise DataError(f"{source!r} cannot be read: {error}") from error
    if not paths:
        raise DataError(f"{source!r}: there is no file that ends with {', '.join(SUFFIXES)}")
    here = str(Path.cwd()) + "/"
    return [path.removeprefix(here) if not start else start + path for path in paths]


def _inside(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Files of rows anywhere in a folder, but for hidden ones and those that begin with ``_``."""
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    return sorted(
        info.path
        for info in filesystem.get_file_info(selector)
        if info.type is pafs.FileType.File
        and info.path.endswith(SUFFIXES)
        and not any(p.startswith((".", "_")) for p in info.path[len(folder) :].split("/"))
    )


def _called(name: str) -> pd.DataFrame:
    """What a person's own function returns.

    Raises:
        DataError: when it cannot be called, or returns no columns.
    """
    import pandas as pd

    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)()
    except Exception as error:
        raise DataError(f"data.source {name!r}: {type(error).__name__}: {error}") from error
    if isinstance(found, pd.DataFrame):
        return found.reset_index(drop=True)
    if isinstance(found, Mapping):
        try:
            return pd.DataFrame(dict(found))
        except ValueError as error:
            raise DataError(f"data.source {name!r}: {error}") from error
    raise DataError(
        f"data.source {name!r} must return a pandas data frame or columns by name, but returned "
        f"{type(found).__name__}"
    )


def _with_texts(frame: pd.DataFrame, texts: Collection[str]) -> pd.DataFrame:
    for name in texts:
        if name in frame.columns:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "")
    return frame


def _json_lines(path: str) -> Iterator[dict[str, Any]]:
    """Every line's object, with the standard library's parser, which HTTP bodies go through too:
    pandas' own rounds numbers, and drops half a surrogate pair."""
    with files.open_file(path) as opened, io.TextIOWrapper(opened, "utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield json_row(line, f"{path}: line {number}")


def json_row(line: str | bytes, where: str) -> dict[str, Any]:
    """One line of JSON lines.

    Args:
        where: the line, for an error to name.

    Raises:
        DataError: when it is not an object.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object of columns, but is {row!r:.80}")
    return row


def sklearn_table(name: str) -> pd.DataFrame:
    """A table inside scikit-learn, with its classes by name where it has any.

    Raises:
        DataError: when there is none of that name.
    """
    from sklearn import datasets

    if name not in SKLEARN_TABLES:
        raise DataError(
            f"data.source 'sklearn:{name}' is not a table; known: {', '.join(SKLEARN_TABLES)}"
        )
    loaded = getattr(datasets, f"load_{name}")(as_frame=True)
    frame: pd.DataFrame = loaded.frame
    if "target_names" in loaded:
        frame = frame.assign(target=loaded.target_names[frame["target"]])
    return frame
