"""Folders on a local disk or on any file system pyarrow knows (``s3://``, ``gs://``)."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs as pafs

from lepton_ray.errors import StoreError


def is_uri(folder: str) -> bool:
    """Whether a folder is named by a URI, and may be on another machine."""
    return "://" in folder


def open_folder(folder: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder and the folder's path on it; nothing is created.

    Raises:
        StoreError: for a URI pyarrow does not know.
    """
    if not is_uri(folder):
        return pafs.LocalFileSystem(), str(Path(folder).absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(folder)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"storage {folder!r} cannot be opened: {error}; use a folder, s3://BUCKET/PATH or "
            "gs://BUCKET/PATH"
        ) from error
    return filesystem, path


def read(filesystem: pafs.FileSystem, path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: when it is not there or cannot be read.
    """
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.read()
        return content


def write(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Write a file whole or not at all: aside and renamed; an object store does so by itself.

    Raises:
        OSError: when it cannot be written.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    aside = f"{path}.tmp"
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
