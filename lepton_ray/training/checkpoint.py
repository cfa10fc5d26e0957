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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
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
        self._fs, self._root = storage.open_folder(uri)
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
        data = save_tensors(tensors)
        manifest = {
            "format": FORMAT,
            "step": step,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "values": values,
        }
        try:
            self._fs.create_dir(folder, recursive=True)
            storage.write(self._fs, f"{folder}/{DATA}", data)
            storage.write(self._fs, f"{folder}/{MANIFEST}", json.dumps(manifest).encode())
        except OSError as error:
            self._remove(folder)
            raise CheckpointError(f"checkpoint of step {step} not written: {error}") from error
        self._prune()
        return Saved(step=step, path=folder, bytes=len(data))

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
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        found = []
        for entry in self._fs.get_file_info(selector):
            name = PurePosixPath(entry.path).name
            if entry.type != pafs.FileType.Directory or not name.startswith(PREFIX):
                continue
            manifest, data = self._fs.get_file_info(
                [f"{entry.path}/{MANIFEST}", f"{entry.path}/{DATA}"]
            )
            if manifest.type == pafs.FileType.File and name.removeprefix(PREFIX).isdigit():
                step = int(name.removeprefix(PREFIX))
                found.append(Saved(step=step, path=entry.path, bytes=data.size or 0))
        return sorted(found, key=lambda saved: saved.step)

    def _read(self, saved: Saved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            manifest = json.loads(storage.read(self._fs, f"{saved.path}/{MANIFEST}"))
            data = storage.read(self._fs, f"{saved.path}/{DATA}")
            if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
                raise CheckpointError(f"{saved.path}: the bytes do not match the manifest")
            return load_tensors(data), manifest["values"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{saved.path}: {error}") from error

    def _prune(self) -> None:
        for saved in expendable(
            self.list(),
            keep=self._keep,
            keep_every=self._keep_every,
            max_bytes=self._max_bytes,
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


def copy_last(source: CheckpointFolder, target: CheckpointFolder) -> None:
    """Begin where another training is, in a folder that has no checkpoint yet."""
    found = source.load_last() if not target.list() else None
    if found is not None:
        target.save(found[1]["step"], *found)


def expendable(
    saved: Sequence[Saved], *, keep: int, keep_every: int | None, max_bytes: float
) -> list[Saved]:
    """Which checkpoints go, of those given oldest first; never the last."""
    gone = [s for s in saved[:-keep] if keep_every is None or s.step % keep_every]
    kept = [s for s in saved if s not in gone]
    while len(kept) > 1 and sum(s.bytes for s in kept) > max_bytes:
        gone.append(kept.pop(0))
    return gone


class Checkpointer:
    """Saves in a thread of its own, one checkpoint at a time, so that steps do not wait.

    A failed save (a full disk) is reported and stops nothing.
    """

    def __init__(self, folder: CheckpointFolder, report: Callable[[dict[str, Any]], None]) -> None:
        self._folder = folder
        self._report = report
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Start to save copies that the caller no longer changes; waits for the one before."""
        self.wait()

        def write() -> None:
            try:
                saved = self._folder.save(step, tensors, values)
                self._report({"kind": "checkpoint", "step": step, "bytes": saved.bytes})
            except CheckpointError as error:
                logger.warning("%s", error)
                self._report({"kind": "checkpoint_failed", "step": step, "error": str(error)})

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save in flight is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
