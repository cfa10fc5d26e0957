"""Who trains together: the replicas of a generation, and how one generation follows another.

A generation is a set of replicas with a process group of its own. The training loop asks its
`Membership` for the first one, and for the next when a replica comes, goes or is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lepton_ray.errors import DivergenceError
from lepton_ray.training import determinism
from lepton_ray.training.membership.generations import Progress
from lepton_ray.training.membership.peers import LostPeerError, Peers

__all__ = [
    "DoubtError",
    "Entry",
    "Fixed",
    "LeftError",
    "Membership",
    "Peers",
    "LostPeerError",
    "OutvotedError",
    "Progress",
    "refusal",
]

PAUSE_S = 60.0


class LeftError(Exception):
    """This replica was asked to leave, and has."""


class OutvotedError(DivergenceError):
    """This replica holds other bytes than most."""


class DoubtError(Exception):
    """Another replica was outvoted, and its gradients are in this one's state: what came after the
    last common link of the digest is void."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A generation as one of its replicas enters it."""

    peers: Peers
    source: int
    """Rank that holds the state to go on from."""
    behind: tuple[int, ...] = ()
    """Ranks that need that state before training goes on."""
    joining: tuple[int, ...] = ()
    """The last ranks, if they have no state: they take it while the others train on."""
    restore: bool = False
    """Nobody holds a state: the source looks for a checkpoint first."""


class Membership(Protocol):
    lasting: bool
    """Whether training goes on with those that remain when a replica is lost."""

    @property
    def leaving(self) -> bool:
        """Whether this replica is asked to leave at the next step boundary."""

    def change_wished(self) -> bool:
        """Asked before every step: whether the next generation should follow after it."""

    def note_pace(self, shard_s: float) -> None:
        """Told after every step: what this replica's own work on one shard took."""

    def enter(
        self, profile: dict[str, Any] | None, progress: Progress | None, *, done: bool = False
    ) -> Entry | None:
        """Wait for the next generation; None when all are done and the run ends.

        Args:
            profile: the replica's numerics as JSON; None where they need not be equal.
            progress: how far this replica's state is; None for one that has none yet.
            done: it has nothing left to train.

        Raises:
            DivergenceError: when this replica computes unlike the others.
            LeftError: when it was asked to leave.
        """


class Fixed:
    """One generation for the life of the process: a single replica, or a group given.

    Args:
        group: of ``torch.distributed``; None for one replica.
        should_pause: whether the group is about to be ended from outside, to start again at
            another size: replicas then hold at the next step boundary.
    """

    lasting = False

    def __init__(
        self,
        group: Any = None,
        *,
        device: Any = None,
        should_pause: Callable[[], bool] = lambda: False,
    ) -> None:
        self._peers = Peers(group, device)
        self._should_pause = should_pause
        self._entered = False

    @property
    def leaving(self) -> bool:
        return self._should_pause()

    def change_wished(self) -> bool:
        return self._should_pause()

    def note_pace(self, shard_s: float) -> None:
        """Nobody compares it: Ray Train shows the workers' times."""

    def enter(
        self, profile: dict[str, Any] | None, progress: Progress | None, *, done: bool = False
    ) -> Entry | None:
        if done:
            return None
        if self._entered:
            time.sleep(PAUSE_S)  # ended meanwhile; if not, training goes on
            return Entry(peers=self._peers, source=0)
        self._entered = True
        if profile is not None and self._peers.size > 1:
            profiles = self._peers.gather_json(profile)
            for rank, other in enumerate(profiles):
                reason = refusal(f"replica {rank}", other, profiles[0])
                if reason:
                    raise DivergenceError(reason)
        everyone_else = tuple(range(1, self._peers.size))
        return Entry(peers=self._peers, source=0, behind=everyone_else, restore=True)


def refusal(name: str, profile: dict[str, Any], others: dict[str, Any]) -> str:
    """Why a replica cannot train with others of another numerics profile; "" if it can."""
    differing = determinism.differences(others, profile)
    if not differing:
        return ""
    return (
        f"{name} computes unlike the others ({'; '.join(differing)}): use one kind of machine, or "
        "set train.exact: false"
    )
