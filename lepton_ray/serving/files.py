"""A version's files as they travel to other nodes: whole, by name, in Ray's object store."""

from __future__ import annotations

from pathlib import Path

Files = dict[str, bytes]


def read_files(folder: Path) -> Files:
    """Every file of a version by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(files: Files, folder: Path) -> None:
    """The inverse of `read_files`."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
