"""A SQLite database whose copies lie in the cluster's storage, and outlive its machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import tempfile
from pathlib import Path

from lepton_ray import storage
from lepton_ray.errors import StoreError

logger = logging.getLogger(__name__)


class Backup:
    """Of one database file, in a folder or at a URI.

    A copy is two files, ``NAME`` and ``NAME.sha256``, and there are two copies: the last one is
    written over the older of them, so that one is whole at any time.
    """

    def __init__(self, database: Path, folder: str) -> None:
        self._database = database
        self._folder = folder
        self._saved = ""
        self._next = 0
        self._number = 0

    @property
    def name(self) -> str:
        return self._database.name

    def restore(self) -> bool:
        """Bring the newest whole copy here, unless the database is here; whether one was brought.

        Raises:
            StoreError: when there are copies and none of them is whole.
            OSError: when the storage cannot be read.
        """
        if self._database.exists():
            return False
        found = [(copy, self._read(copy)) for copy in (0, 1)]
        present = [(copy, content) for copy, content in found if content is not None]
        whole = [(number, copy, content) for copy, (number, content) in present if content]
        if not whole:
            if present:
                raise StoreError(
                    f"no copy of {self._database.name} in {self._folder} is whole: repair or "
                    "remove them; starting with an empty database would hide what was recorded"
                )
            return False
        self._number, copy, content = max(whole)
        self._database.parent.mkdir(parents=True, exist_ok=True)
        aside = self._database.with_suffix(".restored")
        aside.write_bytes(content)
        aside.replace(self._database)
        self._next = 1 - copy
        self._saved = hashlib.sha256(content).hexdigest()
        return True

    def save(self) -> bool:
        """Copy the database, while others write to it, if it changed since the last time.

        Raises:
            OSError: when the storage cannot be written.
        """
        if not self._database.exists():
            return False
        content = snapshot(self._database)
        digest = hashlib.sha256(content).hexdigest()
        if digest == self._saved:
            return False
        filesystem, root = storage.open_folder(self._folder)
        filesystem.create_dir(root, recursive=True)
        path = f"{root}/{self._database.name}.{self._next}"
        # The digest goes last and first away: a copy that was cut off is never taken for whole.
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{path}.sha256")
        storage.write(filesystem, path, content)
        self._number += 1
        storage.write(filesystem, f"{path}.sha256", f"{self._number} {digest}\n".encode())
        self._saved, self._next = digest, 1 - self._next
        return True

    def _read(self, copy: int) -> tuple[int, bytes] | None:
        """The number and content of a copy; no content when it is not whole, None when absent."""
        filesystem, root = storage.open_folder(self._folder)
        path = f"{root}/{self._database.name}.{copy}"
        try:
            content = storage.read(filesystem, path)
        except FileNotFoundError:
            return None
        try:
            number, digest = storage.read(filesystem, f"{path}.sha256").decode().split()
        except FileNotFoundError:
            return 0, b""
        if hashlib.sha256(content).hexdigest() != digest:
            return 0, b""
        return int(number), content


def snapshot(database: Path) -> bytes:
    """The bytes of a database as of one moment, by SQLite's online backup."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.db"
        source = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20)
        target = sqlite3.connect(path)
        with contextlib.closing(source), contextlib.closing(target):
            source.backup(target)
        return path.read_bytes()
