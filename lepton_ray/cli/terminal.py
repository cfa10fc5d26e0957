"""What a person sees: lines, one line of progress, errors."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

PLAIN_PROGRESS_S = 10  # between two progress lines where they cannot be replaced


class UnreadError(Exception):
    """Whoever read the output has gone, as `head` does."""


class Terminal:
    """Lines for a person; with ``--json`` only errors, on standard error, and the result."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._out = sys.stdout
        self._live = sys.stdout.isatty() and not quiet
        self._transient = 0  # lines that the next ones replace
        self._told_at = time.monotonic()

    def say(self, text: str) -> None:
        logging.getLogger(__name__).info("%s", text)
        if not self._quiet:
            self._clear()
            self._print(text)

    def result(self, value: Any) -> None:
        """What a command ends with, for ``--json``."""
        if self._quiet:
            self._print(json.dumps(value))

    def progress(self, text: str) -> None:
        if not self._live:
            if not self._quiet and time.monotonic() - self._told_at >= PLAIN_PROGRESS_S:
                self._told_at = time.monotonic()
                self._print(text.splitlines()[0])
        else:
            columns, rows = os.get_terminal_size()
            self._clear()
            lines = [line[: columns - 1] for line in text.splitlines()[: max(1, rows - 1)]]
            self._print("\n".join(lines), end="")
            self._transient = len(lines)

    def error(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._transient:
            up = f"\x1b[{self._transient - 1}A" if self._transient > 1 else ""
            self._transient = 0
            self._print(f"\r{up}\x1b[J", end="")

    def _print(self, text: str, end: str = "\n") -> None:
        """
        Raises:
            UnreadError: when nobody reads it.
        """
        try:
            print(text, end=end, file=self._out, flush=True)
        except BrokenPipeError as error:
            raise UnreadError from error
