"""When a group of workers is resized or started again: pure decisions over what was seen.

The effects (asking Ray, pausing replicas, restarting the group) are in `training.controller`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPOT = {"ray.io/market-type": "spot"}
"""How Ray labels a node that may be taken away."""
NO_DASHBOARD = b"127.0.0.1:1"
"""Stands for the dashboard's address where a process has started Ray for itself: whoever asks is
refused at once, and where nothing is found Ray looks for 40 s. No autoscaler is there either."""
MAX_STUCK = 3  # failures in a row without one step done: the cause does not go away by itself


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One living node as the controller sees it."""

    id: str
    free: Mapping[str, float]
    """Resources nobody holds."""
    ours: int
    """Workers of Ray Train's group on it."""
    draining: bool
    """It will be taken away (a spot notice, an autoscaler that shrinks)."""
    for_group: bool = True
    """Ray Train's group may run on it."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    size: int
    reason: str


def possible_workers(nodes: Sequence[NodeView], each: Mapping[str, float]) -> int:
    """How many of the group's workers fit on nodes that stay, those that run there included."""
    total = 0
    for node in nodes:
        if node.draining or not node.for_group:
            continue
        fits = [int(node.free.get(name, 0.0) // amount) for name, amount in each.items() if amount]
        total += node.ours + max(0, min(fits, default=0))
    return total


def decide_resize(
    nodes: Sequence[NodeView],
    each: Mapping[str, float],
    *,
    current: int,
    minimum: int,
    maximum: int,
    live: int,
) -> Resize | None:
    """Whether a running group should pause and go on at another size.

    A worker on a draining node leaves while the others have room for the minimum, or go on without
    the group; else it stays together until the node is gone. More room means a larger group.

    Args:
        live: live replicas that train on nodes that stay.
    """
    room = min(maximum, possible_workers(nodes, each))
    leaving = sum(node.ours for node in nodes if node.draining)
    if leaving:
        if room < minimum and not live:
            return None
        size = max(minimum, room)
        return Resize(size=size, reason=f"{leaving} of {current} workers on a draining node")
    if room > current:
        return Resize(size=room, reason=f"room for {room} workers")
    return None


def decide_start(
    nodes: Sequence[NodeView], each: Mapping[str, float], *, minimum: int, maximum: int
) -> int | None:
    """The size of a group that is to start; None while there is no room for the minimum."""
    room = min(maximum, possible_workers(nodes, each))
    return room if room >= minimum else None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a group failed."""

    step: int
    """Steps done when it failed, as far as known."""
    exception: str
    """What the training function raised, "" when processes died or only connections broke."""
    fatal: bool = False
    """Raised on purpose by this package: trying again gives the same."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    retry: bool
    reason: str


def decide_failure(failure: Failure, earlier: Sequence[Failure]) -> Verdict:
    """Whether to start the group again from its last checkpoint.

    Failures are retried without limit while training gets on. An exception of the training
    function is retried once: a fault of the machine does not come back at the same step, one of
    the code does.
    """
    if failure.fatal:
        return Verdict(retry=False, reason="the same would happen again")
    if failure.exception and failure in earlier:
        return Verdict(retry=False, reason=f"the same exception twice at step {failure.step}")
    stuck = [f for f in earlier if f.step >= failure.step]
    if len(stuck) >= MAX_STUCK:
        times = f"failed {len(stuck) + 1} times without getting past step {failure.step}"
        return Verdict(retry=False, reason=times)
    if failure.exception:
        last = failure.exception.strip().splitlines()[-1]
        return Verdict(retry=True, reason=f"an exception, tried once more: {last}")
    return Verdict(retry=True, reason="a worker was lost")
