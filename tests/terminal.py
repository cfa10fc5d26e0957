"""A terminal that keeps what is said."""

from __future__ import annotations


class Lines:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.progressed: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, text: str) -> None:
        self.progressed.append(text)
