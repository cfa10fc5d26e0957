"""Checkpoints: complete, atomic, checksummed, without pickle, written beside the training.

A checkpoint is a folder ``step-0000001234`` with ``state.safetensors`` and, written last,
``manifest.json`` with the SHA-256 of the first. A folder without a manifest is not a checkpoint;
one whose bytes do not match is skipped with a warning in favour of the one before. The folder is
local or on any file system pyarrow knows (``s3://``, ``gs://``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lepton_ray import storage
from lepton_ray.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "step-"
DATA = "state.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Saved:
    step: int
    path: str
    bytes: int


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        uri: a local path or the URI of a pyarrow file system.
        keep: how many of the last ones stay.
        keep_every: those at a multiple of this many steps stay besides; None for no such.
        max_bytes: limit of all of them together; the last always stays.
    """

    def __init__(
        self,
        uri: str,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        max_bytes: float = float("inf"),
    ) -> None:
        self._fs, self._root = storage.open_folder(uri, patient=True)
        self._keep = keep
        self._keep_every = keep_every
        self._max_bytes = max_bytes

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> Saved:
        """Write one checkpoint and drop those beyond the limits.

        Raises:
            CheckpointError: when it cannot be written; nothing half-written is left, and the
                earlier ones are untouched.
        """
        folder = self._folder(step)
        before = self._fs.get_file_info(f"{folder}/{MANIFEST}").type == pafs.FileType.File
        try:
            self._fs.create_dir(folder, recursive=True)
            with storage.writing(self._fs, f"{folder}/{DATA}") as file:
                save_file(tensors, file)  # its sister `save` stops all threads while it copies
                size, sha256 = os.path.getsize(file), _sha256(file)
            manifest = {
                "format": FORMAT,
                "step": step,
                "bytes": size,
                "sha256": sha256,
                "values": values,
            }
            storage.write(self._fs, f"{folder}/{MANIFEST}", json.dumps(manifest).encode())
        except (OSError, SafetensorError) as error:
            if not before:  # else it is whole, with what was measured before
                self._remove(folder)
            raise CheckpointError(f"checkpoint of step {step} not written: {error}") from error
        links = values.get("links") or [(0, "")]
        self._prune(step, since=links[-1][0])
        return Saved(step=step, path=folder, bytes=size)

    def load_last(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of the last whole checkpoint, None when there is none."""
        for saved in reversed(self.list()):
            try:
                return self._read(saved)
            except CheckpointError as error:
                logger.warning("skipping a checkpoint: %s", error)
        return None

    def drop_after(self, step: int) -> None:
        """Remove those of later steps."""
        for saved in self.list():
            if saved.step > step:
                self._remove(saved.path)

    def list(self) -> list[Saved]:
        """Checkpoints that have a manifest, oldest first; their bytes are not checked."""
        return [saved for saved, whole in self._folders() if whole]

    def _folders(self) -> Sequence[tuple[Saved, bool]]:
        """All, oldest first, and whether each has a manifest."""
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        found = []
        for entry in self._fs.get_file_info(selector):
            name = PurePosixPath(entry.path).name
            number = name.removeprefix(PREFIX)
            if entry.type != pafs.FileType.Directory or name == number or not number.isdigit():
                continue
            manifest, data = self._fs.get_file_info(
                [f"{entry.path}/{MANIFEST}", f"{entry.path}/{DATA}"]
            )
            saved = Saved(step=int(number), path=entry.path, bytes=data.size or 0)
            found.append((saved, manifest.type == pafs.FileType.File))
        return sorted(found, key=lambda one: one[0].step)

    def _read(self, saved: Saved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            manifest = json.loads(storage.read(self._fs, f"{saved.path}/{MANIFEST}"))
            with storage.reading(self._fs, f"{saved.path}/{DATA}") as file:
                if _sha256(file) != manifest["sha256"]:
                    raise CheckpointError(f"{saved.path}: the bytes do not match the manifest")
                mapped = load_file(file)  # training goes on when the file is gone
                return {n: t.clone() for n, t in mapped.items()}, manifest["values"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{saved.path}: {error}") from error

    def _prune(self, step: int, since: int) -> None:
        for saved, whole in self._folders():
            if not whole and saved.step < step:
                self._remove(saved.path)  # of a replica that was lost while it wrote
        for saved in expendable(
            self.list(),
            keep=self._keep,
            keep_every=self._keep_every,
            max_bytes=self._max_bytes,
            since=since,
        ):
            self._remove(saved.path)

    def _remove(self, folder: str) -> None:
        try:
            info = self._fs.get_file_info(f"{folder}/{MANIFEST}")
            if info.type == pafs.FileType.File:
                self._fs.delete_file(info.path)  # first, so that no half of it looks whole
            self._fs.delete_dir(folder)
        except OSError as error:
            logger.warning("cannot remove %s: %s", folder, error)

    def _folder(self, step: int) -> str:
        return f"{self._root}/{PREFIX}{step:010d}"


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_last(source: CheckpointFolder, target: CheckpointFolder) -> None:
    """Begin where another training is, in a folder that has no checkpoint yet."""
    found = source.load_last() if not target.list() else None
    if found is not None:
        target.save(found[1]["step"], *found)


def expendable(
    saved: Sequence[Saved],
    *,
    keep: int,
    keep_every: int | None,
    max_bytes: float,
    since: int = 0,
) -> list[Saved]:
    """Which checkpoints go, of those given oldest first; never the last.

    Args:
        since: the last step in which replicas were compared. Where more than one is kept, the last
            one before it is: if they differ the next time, training goes back to it.
    """
    back = max((s.step for s in saved if s.step <= since), default=None) if keep > 1 else None
    gone = [
        s for s in saved[:-keep] if s.step != back and (keep_every is None or s.step % keep_every)
    ]
    kept = [s for s in saved if s not in gone]
    while len(kept) > 1 and sum(s.bytes for s in kept) > max_bytes:
        gone.append(kept.pop(0))
    return gone
