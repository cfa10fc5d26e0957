"""Folders on a local disk or on any file system pyarrow knows (``s3://``, ``gs://``)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from lepton_ray.errors import StoreError

COPIED_BYTES = 16 << 20  # at a time, between this machine and another
PATIENT_TRIES = 10  # with growing pauses: a minute and a half


def is_uri(folder: str) -> bool:
    """Whether a folder is named by a URI, and may be on another machine."""
    return "://" in folder


def open_folder(folder: str, *, patient: bool = False) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder and the folder's path on it; nothing is created.

    Args:
        patient: an S3 store that does not answer is given a minute and a half, not six seconds: for
            what may not be lost. Google's is given 15 minutes by its own client.

    Raises:
        StoreError: for a URI that pyarrow, and for ``hf://`` the hub's own package, does not know.
    """
    if not is_uri(folder):
        return pafs.LocalFileSystem(), str(Path(folder).absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(folder)
    except ImportError as error:
        raise StoreError(
            f"{folder!r} is read by a package that is not installed ({error}): "
            "pip install 'lepton-ray[hf]' for hf://"
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"storage {folder!r} cannot be opened: {error}; use a folder, s3://BUCKET/PATH or "
            "gs://BUCKET/PATH"
        ) from error
    if patient and isinstance(filesystem, pafs.S3FileSystem):
        _, (options, *_) = filesystem.__reduce__()  # from_uri takes no strategy
        tries = pafs.AwsStandardS3RetryStrategy(max_attempts=PATIENT_TRIES)
        filesystem = pafs.S3FileSystem(**options | {"retry_strategy": tries})
    return filesystem, path


def read(filesystem: pafs.FileSystem, path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: when it is not there or cannot be read.
    """
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.read()
        return content


@contextlib.contextmanager
def reading(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    """The path on this machine of a file, or of a copy of it that goes with the block.

    Raises:
        OSError: when it is not there or cannot be read.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = f"{scratch}/copy"
        with filesystem.open_input_stream(path) as stream, open(copy, "wb") as file:
            shutil.copyfileobj(stream, file, COPIED_BYTES)
        yield copy


def write(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: when it cannot be written.
    """
    with writing(filesystem, path) as aside:
        Path(aside).write_bytes(content)


@contextlib.contextmanager
def writing(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    """The path on this machine of a file to write, which is at ``path`` when the block has ended:
    whole or not at all, renamed or, on an object store, sent.

    Raises:
        OSError: when it cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        local = isinstance(filesystem, pafs.LocalFileSystem)
        # A name that no other process has: a replica taken for lost may write still.
        aside = f"{path}.{uuid.uuid4().hex}.tmp" if local else f"{scratch}/file"
        try:
            yield aside
            with open(aside, "rb") as file:
                if local:
                    os.fsync(file.fileno())
                else:
                    with filesystem.open_output_stream(path) as stream:
                        shutil.copyfileobj(file, stream, COPIED_BYTES)
            if local:
                os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
