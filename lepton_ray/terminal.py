"""Where a person reads how it goes; the command line has the one that writes."""

from __future__ import annotations

from typing import Protocol


class Terminal(Protocol):
    """Takes lines for a person."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def progress(self, text: str) -> None:
        """Lines that the next ones replace; where they cannot, the first now and then."""


class Silent:
    """A terminal nobody reads."""

    def say(self, text: str) -> None:
        pass

    def progress(self, text: str) -> None:
        pass
