"""The access log: a file of JSON lines beside the replica's own log.

Not through `logging` line by line: with Serve's filters and formatter that took a sixth of all the
time a replica spends on a request of a small model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

FLUSH_S = 1.0
MOST = 1000  # lines that wait


class AccessLog:
    """Takes lines in a running event loop and writes them within a second.

    Args:
        path: of the file; older ones get numbers.
        max_bytes: of a file.
        backups: older files that are kept.
    """

    def __init__(self, path: Path, *, max_bytes: int, backups: int) -> None:
        self._file = RotatingFileHandler(path, maxBytes=max_bytes, backupCount=backups)
        self._waiting: list[dict[str, Any]] = []

    def __call__(self, line: dict[str, Any]) -> None:
        """One request: a flat mapping, to which the time is added."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        self._waiting.append({"time": round(time.time(), 3), **line})
        if len(self._waiting) >= MOST:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            lines, self._waiting = self._waiting, []
            text = b"\n".join(map(orjson.dumps, lines)).decode()
            self._file.emit(logging.makeLogRecord({"msg": text}))


def beside(logger: logging.Logger) -> AccessLog:
    """For a replica that logs here: a file next to the logger's, rotated like it."""
    handlers = [getattr(handler, "target", handler) for handler in logger.handlers]
    log = next(handler for handler in handlers if isinstance(handler, RotatingFileHandler))
    path = Path(log.baseFilename)
    return AccessLog(
        path.with_name(f"access_{path.name}"), max_bytes=log.maxBytes, backups=log.backupCount
    )
