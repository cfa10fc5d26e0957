"""Files of rows, here or at a URI: opened by path, with errors that name them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import pyarrow as pa

from lepton_ray import storage
from lepton_ray.errors import DataError


def open_file(path: str, size: int | None = None) -> pa.NativeFile:
    """For reading at random places.

    Args:
        size: bytes that it has where it was asked for, if that was elsewhere.

    Raises:
        OSError: when it is not there or cannot be read, or is another one.
    """
    filesystem, at = storage.open_folder(path)
    file = filesystem.open_input_file(at)
    if size not in (None, here := file.size()):
        file.close()
        raise OSError(f"{path} has {here} bytes here, and {size} elsewhere")
    return file


def size_of(path: str) -> int:
    """Bytes of a file.

    Raises:
        DataError: when it is not there or cannot be read.
    """
    with naming(path), open_file(path) as file:
        size: int = file.size()
        return size


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """
    Raises:
        DataError: in place of whatever else says that the file is none of its kind.
    """
    try:
        yield
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


def check_same(first: str, columns: Collection[str], path: str, found: Collection[str]) -> None:
    """
    Raises:
        DataError: where a file has not the columns of the first.
    """
    if set(found) == set(columns):
        return
    lacks = sorted(map(str, set(columns) - set(found)))
    more = sorted(map(str, set(found) - set(columns)))
    said = f"lacks {lacks[0]!r}" if lacks else f"has {more[0]!r} besides"
    raise DataError(f"{path}: must have the columns of {first}, but {said}")
