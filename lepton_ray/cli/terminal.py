"""What a person sees: lines, one line of progress, errors."""

from __future__ import annotations

import logging
import os
import sys
import time

PLAIN_PROGRESS_S = 10  # between two progress lines where they cannot be replaced


class Terminal:
    """Lines for a person; with ``--json`` only errors, on standard error."""

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
            print(text, file=self._out, flush=True)

    def progress(self, text: str) -> None:
        if not self._live:
            if not self._quiet and time.monotonic() - self._told_at >= PLAIN_PROGRESS_S:
                self._told_at = time.monotonic()
                print(text.splitlines()[0], file=self._out, flush=True)
        else:
            columns, rows = os.get_terminal_size()
            self._clear()
            lines = [line[: columns - 1] for line in text.splitlines()[: max(1, rows - 1)]]
            print("\n".join(lines), end="", file=self._out, flush=True)
            self._transient = len(lines)

    def error(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._transient:
            up = f"\x1b[{self._transient - 1}A" if self._transient > 1 else ""
            print(f"\r{up}\x1b[J", end="", file=self._out)
            self._transient = 0
