"""How a replica without a state comes to hold it while the others train on.

At each step boundary a part of the weights travels, with what the optimizer and the averages hold
of them. From then on that part is right: the joiner takes part in every step's exchange and applies
the sums to all it has, and an optimizer changes a parameter by that parameter's gradient and state
alone. What has not arrived is void, and is overwritten when it does. With the last part the joiner
hosts shards. So the others never stand still for longer than one part takes.
"""

from __future__ import annotations

from lepton_ray.training.membership import Entry, delivery
from lepton_ray.training.state import TrainState

PART_BYTES = 16 << 20
"""Of weights: with Adam's moments and averages four times that. One tensor, if it is larger."""


class Arrival:
    """One state on its way to those that join a generation.

    Args:
        state: of this replica; overwritten where it joins.
        entry: the generation.
    """

    def __init__(self, state: TrainState, entry: Entry) -> None:
        self._state = state
        self._entry = entry
        self._left = state.parts(PART_BYTES)
        self.parts = len(self._left)

    def go_on(self, *, to_the_end: bool = False) -> bool:
        """The next part, or all that are left; True when nothing is. Collective.

        Raises:
            LostPeerError: when a replica is gone; the state of a joiner is void.
        """
        entry = self._entry
        names = self._left.pop()
        while to_the_end and self._left:
            names += self._left.pop()
        given = self._state.view(names) if entry.peers.rank == entry.source else ({}, {})
        tensors, values = delivery.deliver(entry.peers, *given, entry.source, entry.joining)
        if entry.peers.rank in entry.joining:
            self._state.load(tensors, values, whole=False)
        return not self._left
