"""Who does the work on many rows: this process, or as many others as a cluster has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

LARGE = 128 << 20  # bytes of rows from which others are asked: one process takes ten seconds
Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Hands(Protocol):
    def map(
        self, what: str, do: Callable[[Piece], Result], pieces: Iterable[Piece], total: int
    ) -> Iterator[Result]:
        """What ``do`` makes of each piece, in their order.

        Args:
            what: the pieces are, for a person to read.
            do: a function of a module: it may be called in another process.
            pieces: are taken as they are needed, a few before their turn.
            total: how many there are, about.

        Raises:
            LeptonRayError: that ``do`` raises.
        """


class Own:
    """This process, one piece after the other."""

    def map(
        self, what: str, do: Callable[[Piece], Result], pieces: Iterable[Piece], total: int
    ) -> Iterator[Result]:
        return map(do, pieces)


def enough(size: int, hands: Hands) -> Hands:
    """Those that are given for ``size`` bytes of rows; this process alone for few."""
    return hands if size >= LARGE else Own()
