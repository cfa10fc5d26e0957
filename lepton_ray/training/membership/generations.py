"""Which replicas form the next generation: a pure decision over who is there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SLOW = 1.5
"""A replica that takes so many times as long as the others holds them up."""

Progress = tuple[int, int]
"""How far a replica's state is: steps and epochs done. Equal progress means equal bytes."""


@dataclass(kw_only=True)
class Standing:
    """One connected replica as the coordinator sees it."""

    id: str
    guaranteed: bool
    """Part of Ray Train's group."""
    node: str = ""
    member: bool = False
    """Of the generation that trains."""
    arrived: bool = False
    """Waits for the next generation."""
    progress: Progress | None = None
    """Of an arrived one: how far its state is; None when it has none."""
    done: bool = False
    """Of an arrived one: it has nothing left to train."""
    leaving: bool = False
    """Asked to leave at the next step boundary."""
    shard_s: float | None = None
    """What its own work on one shard takes, lately."""
    slow_since: float | None = None
    """When it began to take far longer than the others (s of a clock that only goes forward)."""
    told_slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Generation:
    members: tuple[str, ...]
    """In rank order."""
    source: int
    """Rank whose state all go on from."""
    behind: tuple[int, ...] = ()
    """Ranks that need it before they can go on."""
    joining: tuple[int, ...] = ()
    """Ranks that have none yet, the last ones: they take it while the others go on."""
    restore: bool = False
    """Nobody has a state: the source takes the last checkpoint's, or starts anew."""


@dataclass(frozen=True)
class End:
    """Everybody is done."""


def decide(standings: Sequence[Standing], minimum: int) -> Generation | End | None:
    """What follows; None while somebody is waited for.

    Nothing follows before all members of the training generation have arrived: they hold the state.
    Without one a run starts, or starts again from its checkpoint, when ``minimum`` guaranteed
    replicas are there. It ends when everybody is done and those are among them, because the result
    is theirs to hand over.

    Args:
        standings: the connected replicas in the order in which they came, members first.
        minimum: guaranteed replicas of the run.
    """
    if any(s.member and not s.arrived for s in standings):
        return None
    arrived = [s for s in standings if s.arrived]
    there = [s for s in arrived if not s.leaving]
    if there and all(s.progress is None for s in there):
        # The state is that of one that leaves: it hands it over first.
        there += [s for s in arrived if s.leaving and s.progress is not None]
    if not there:
        return None
    complete = sum(s.guaranteed for s in there) >= minimum
    states = [s.progress for s in there if s.progress is not None]
    if not states:
        if not complete:
            return None
        return Generation(
            members=tuple(s.id for s in there),
            source=0,
            behind=tuple(range(1, len(there))),
            restore=True,
        )
    if all(s.done for s in there):
        return End() if complete else None
    furthest = max(states)
    there.sort(key=lambda s: s.progress is None)  # stable
    return Generation(
        members=tuple(s.id for s in there),
        source=next(r for r, s in enumerate(there) if s.progress == furthest),
        behind=tuple(r for r, s in enumerate(there) if s.progress not in (furthest, None)),
        joining=tuple(range(len(states), len(there))),
    )


def held_up(standings: Sequence[Standing], id: str) -> float | None:
    """Seconds that the other members take for a shard, if one of them takes far longer."""
    paces = {s.id: s.shard_s for s in standings if s.member and s.shard_s is not None}
    others = [pace for of, pace in paces.items() if of != id]
    if id not in paces or not others:
        return None
    usual = statistics.median(others)
    return usual if paces[id] > SLOW * usual else None
