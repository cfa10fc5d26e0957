"""The replicas of one generation, and all that they send each other."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

LOOK_S = 0.25  # between two looks, while a collective waits, at whether the generation still stands


class LostPeerError(Exception):
    """A replica of this generation is gone: what was being exchanged is void."""


class Peers:
    """A process group (gloo or NCCL) whose failures are `LostPeerError`.

    Args:
        group: of ``torch.distributed``, or one of its backends; None for a single replica.
        device: of the tensors that this class sends for itself.
        lost: set when the generation ends; a collective that waits then gives up. Without it a
            collective waits for as long as the group's own time-out.
        joining: how many, the last ranks, have no state yet.
    """

    def __init__(
        self,
        group: Any = None,
        device: torch.device | None = None,
        lost: threading.Event | None = None,
        joining: int = 0,
    ) -> None:
        self._group = group
        self.device = device or torch.device("cpu")
        self._lost = lost
        self.broken = False
        """Whether a collective failed."""
        self.waited_s = 0.0
        """For the others, in all."""
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.hosts = self.size - joining
        """The first so many replicas do the work; the others take part in collectives only."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int]
    ) -> Any:
        """Start it; `wait` for the work that is returned. All are flat; splits count elements."""
        return self._start("alltoall_base", received, sent, received_splits, sent_splits)

    def all_gather(self, gathered: Tensor, mine: Tensor) -> Any:
        """Start it; `wait` for the work that is returned. gathered: [size * n], mine: [n]."""
        return self._start("_allgather_base", gathered, mine)

    def wait(self, work: Any) -> None:
        """Until it is done.

        Raises:
            LostPeerError: when a replica is gone.
        """
        began = time.monotonic()
        try:
            if self._lost is None:
                work.wait()
                return
            while not self._waited(work):
                if self._lost.is_set():
                    raise self._failed("it hangs, or its machine is gone")
        except RuntimeError as error:
            raise self._failed(error) from None
        finally:
            self.waited_s += time.monotonic() - began

    def _waited(self, work: Any) -> bool:
        try:
            work.wait(timedelta(seconds=LOOK_S))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # raises what went wrong, if it was not done just after the time was up
        return True

    def gather(self, mine: Tensor) -> Tensor:
        """[size, n] Everybody's [n]."""
        if self.size == 1:
            return mine.unsqueeze(0)
        gathered = torch.empty(self.size * mine.numel(), dtype=mine.dtype, device=self.device)
        self.wait(self.all_gather(gathered, mine.to(self.device)))
        return gathered.view(self.size, -1).to(mine.device)

    def gather_json(self, mine: Any) -> list[Any]:
        """Everybody's plain value."""
        text = json.dumps(mine).encode()
        lengths = self.gather(torch.tensor([len(text)])).flatten()
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.gather(padded)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]

    def add(self, tensor: Tensor) -> None:
        """Add everybody's in place; exact only where all but one are zero."""
        if self.size > 1:
            self.wait(self._start("allreduce", [tensor]))

    def close(self) -> None:
        """Let the group go.

        Taking it down waits for all that is in flight, which with a peer that hangs is until its
        time-out; so a thread does it.
        """
        held = [self._group]
        self._group = None
        threading.Thread(target=held.clear, daemon=True).start()

    def _start(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._group, name)(*arguments)
        except RuntimeError as error:
            raise self._failed(error) from None

    def _failed(self, reason: object) -> LostPeerError:
        self.broken = True
        return LostPeerError(str(reason))
