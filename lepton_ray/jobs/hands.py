"""The processors of a cluster as the hands that prepare many rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from lepton_ray.data.hands import Hands, Own, Piece, Result
from lepton_ray.errors import ClusterError, LeptonRayError
from lepton_ray.jobs import session
from lepton_ray.priority import give_way
from lepton_ray.terminal import Terminal

AHEAD = 2  # pieces for each processor, so that none waits for this process


def of_session(terminal: Terminal) -> Hands:
    """The cluster of the session, or this process where there is none."""
    return ClusterHands(terminal) if ray.is_initialized() else Own()


class ClusterHands:
    """A task of Ray for each piece, a few at a time: what pieces and results take is that of these
    few, however many there are. A piece whose node is lost is done again.

    Ray Data would do for the pieces of files. Columns and rows come from this process, which Ray
    Data reads only whole.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def map(
        self, what: str, do: Callable[[Piece], Result], pieces: Iterable[Piece], total: int
    ) -> Iterator[Result]:
        """See `Hands.map`.

        Raises:
            LeptonRayError: that ``do`` raises.
            ClusterError: when the cluster cannot do it.
        """
        shared = ray.put(do)  # once, and not with each piece
        most = AHEAD * max(1, int(session.resources().get("CPU", 1)))
        waiting: deque[ray.ObjectRef[Any]] = deque()
        done = 0

        def first() -> Result:
            nonlocal done
            try:
                result, error = ray.get(waiting.popleft())
            except RayError as failed:
                raise ClusterError(
                    f"the cluster could not prepare the {what}: {failed}"
                ) from failed
            if error is not None:
                raise error
            done += 1
            self._terminal.progress(f"data   {what}: {done} of {max(done, total)}")
            made: Result = result
            return made

        for piece in pieces:
            waiting.append(_work.remote(shared, piece))
            if len(waiting) == most:
                yield first()
        while waiting:
            yield first()


@ray.remote(num_cpus=1)
def _work(do: Callable[[Any], Any], piece: Any) -> tuple[Any, LeptonRayError | None]:
    """An error of ours is an answer: raised, Ray would tell it in its own words."""
    give_way()
    try:
        return do(piece), None
    except LeptonRayError as error:
        return None, error
