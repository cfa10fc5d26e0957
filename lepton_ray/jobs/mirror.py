"""A file that grows while a run goes on, copied to where the run's state is.

An object store cannot append, so the file is sent whole, at most once a second: a study's journal
has some hundred bytes for each epoch of a trial. What a lost machine had not sent yet is decided
again, and from the same state decided the same.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType

import pyarrow.fs as pafs

from lepton_ray import storage

logger = logging.getLogger(__name__)

EVERY_S = 1.0


def fetch(filesystem: pafs.FileSystem, there: str, here: Path) -> None:
    """Have the copy on this machine if it is longer than what is here, or nothing is.

    Raises:
        OSError: when it is there and cannot be read.
    """
    found = filesystem.get_file_info(there)
    if found.type == pafs.FileType.File and found.size > _size(here):
        here.parent.mkdir(parents=True, exist_ok=True)
        storage.write(pafs.LocalFileSystem(), str(here), storage.read(filesystem, there))


class Mirror:
    """Sends ``here`` to ``there`` whenever it has grown, as long as the block goes on.

    A store that does not answer holds nothing up: it is told once, and tried again.
    """

    def __init__(self, filesystem: pafs.FileSystem, there: str, here: Path) -> None:
        self._fs = filesystem
        self._there = there
        self._here = here
        self._sent = 0
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._send()

    def _keep(self) -> None:
        while not self._over.wait(EVERY_S):
            self._send()

    def _send(self) -> None:
        if _size(self._here) == self._sent:
            return
        try:
            content = self._here.read_bytes()
            if not self._sent:
                self._fs.create_dir(self._there.rpartition("/")[0], recursive=True)
            storage.write(self._fs, self._there, content)
        except OSError as error:
            if not self._failed:
                logger.warning("%s is not copied to %s: %s", self._here, self._there, error)
            self._failed = True
            return
        self._sent, self._failed = len(content), False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
