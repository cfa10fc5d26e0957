"""Files of rows as data frames."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_ray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SKLEARN_TABLES = ("breast_cancer", "diabetes", "iris", "wine")
SUFFIXES = (".csv", ".parquet", ".jsonl")


def read_frame(
    path: Path, texts: Collection[str] = (), as_written: Collection[str] = ()
) -> pd.DataFrame:
    """A CSV, Parquet or JSONL file.

    Args:
        texts: columns whose cells are texts as they stand, also ``123``, ``NA`` and nothing, which
            a CSV cannot tell from numbers and missing values.
        as_written: columns of a CSV whose cells are texts, also ``0123``, or missing.

    Raises:
        DataError: when it is missing, of another kind or cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{str(path)!r} must end with {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist (looked in {Path.cwd()})")
    try:
        return _read(path, texts, as_written)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: must be in UTF-8, but has byte 0x{error.object[error.start]:02x} "
            f"({error.reason}): save it as UTF-8, or convert it with iconv -t utf-8"
        ) from error
    except UnicodeEncodeError as error:  # JSON can say half of a surrogate pair
        raise DataError(
            f"{path}: must be valid Unicode, but holds {error.object[error.start]!r} alone"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read(path: Path, texts: Collection[str], as_written: Collection[str]) -> pd.DataFrame:
    import pandas as pd

    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    elif path.suffix == ".jsonl":
        frame = pd.DataFrame(_json_lines(path))
    else:
        # Whole columns at a time: in parts, one column could come to hold 1 and "1".
        frame = pd.read_csv(path, dtype=dict.fromkeys(as_written, str), low_memory=False)
        if present := [name for name in texts if name in frame.columns]:
            frame[present] = pd.read_csv(path, usecols=present, dtype=str, keep_default_na=False)
    for name in texts:
        if name in frame.columns:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "")
    return frame


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every line's object, with the standard library's parser, which HTTP bodies go through too:
    pandas' own rounds numbers, and drops half a surrogate pair."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: line {number} must be an object of columns, but is {row!r:.80}"
                )
            yield row


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
