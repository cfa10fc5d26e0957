"""Add gradients over replicas in the fixed tree: all-to-all, add in tree order, all-gather.

Every replica sends the sums of its whole subtrees, cut into one piece per replica; the owner of a
piece adds the subtrees in tree order and scales once; the pieces are gathered. All of it is
element-wise, so neither the cut nor the bucket nor the number of replicas enters the result. The
bytes are those of a ring all-reduce when blocks are subtrees; see docs/elastic.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lepton_ray.training.membership import Peers
from lepton_ray.training.shards import Node, block, combine, covering

BUCKET_BYTES = 4 << 20  # large enough to hide latency, small enough to overlap with the backward


class Reduction:
    """The reduction of one bucket, in flight. Call `finish` once, after `start`.

    Args:
        numels: elements of each tensor of the bucket.
        shards: shards of the run.
    """

    def __init__(
        self, numels: Sequence[int], shards: int, peers: Peers, device: torch.device
    ) -> None:
        self._numels = list(numels)
        self._shards = shards
        self._peers = peers
        replicas, replica = peers.size, peers.rank
        self._nodes: list[list[Node]] = [
            covering(hosted(peers, r, shards), shards) for r in range(replicas)
        ]
        total = sum(self._numels)
        self._piece = -(-total // replicas)
        mine = len(self._nodes[replica])
        self._send = torch.zeros(replicas, mine, self._piece, device=device)
        self._receive = torch.empty(
            sum(len(nodes) for nodes in self._nodes) * self._piece, device=device
        )
        self._result = torch.empty(replicas * self._piece, device=device)
        self._send_splits = [mine * self._piece] * replicas
        self._receive_splits = [len(nodes) * self._piece for nodes in self._nodes]
        self._work: Any = None

    def start(self, sums: Sequence[Sequence[Tensor]]) -> None:
        """Send this replica's sums: one sequence of tensors for each of its subtrees."""
        replicas, _, piece = self._send.shape
        for position, tensors in enumerate(sums):
            flat = torch.cat([t.reshape(-1) for t in tensors])
            whole = flat.numel() // piece
            self._send[:whole, position].copy_(flat[: whole * piece].view(whole, piece))
            rest = flat[whole * piece :]
            if rest.numel():
                self._send[whole, position, : rest.numel()].copy_(rest)
        self._work = self._peers.all_to_all(
            self._receive, self._send.view(-1), self._receive_splits, self._send_splits
        )

    def gather(self) -> None:
        """Add the own piece in tree order, scale it by 1 / shards, start to gather all pieces."""
        self._peers.wait(self._work)
        parts: dict[Node, Tensor] = {}
        for nodes, chunk in zip(
            self._nodes, self._receive.split(self._receive_splits), strict=True
        ):
            parts.update(zip(nodes, chunk.view(len(nodes), self._piece), strict=True))
        piece = combine(parts, self._shards, torch.add) * (1.0 / self._shards)
        self._work = self._peers.all_gather(self._result, piece)

    def finish(self) -> list[Tensor]:
        """The reduced tensors, flat; views that stay valid until the next `start`."""
        self._peers.wait(self._work)
        self._work = None
        return list(self._result[: sum(self._numels)].split(self._numels))


def hosted(peers: Peers, replica: int, shards: int) -> range:
    """The shards of one replica; none of one that is still joining."""
    return block(replica, peers.hosts, shards) if replica < peers.hosts else range(0)


def buckets(numels: Sequence[int], limit_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Indices of tensors in the order their gradients appear (last first), cut at a size."""
    cut: list[list[int]] = [[]]
    size = 0
    for index in reversed(range(len(numels))):
        if cut[-1] and size + numels[index] * 4 > limit_bytes:
            cut.append([])
            size = 0
        cut[-1].append(index)
        size += numels[index] * 4
    return cut
