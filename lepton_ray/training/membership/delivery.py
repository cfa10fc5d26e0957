"""How the state of one replica gets to others: tensors as they lie, in packs of moderate size.

Nothing is serialized as a whole: that would hold Python's lock for seconds, in which no beat
reaches the coordinator, and take the memory of the state several times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lepton_ray.training.membership.peers import Peers

PACK_BYTES = 32 << 20  # large enough to hide latency
Kinds = Mapping[str, tuple[str, Sequence[int]]]
"""Type and shape of tensors by name."""


def deliver(
    peers: Peers, tensors: Mapping[str, Tensor], value: Any, source: int, to: Sequence[int]
) -> tuple[Mapping[str, Tensor], Any]:
    """Tensors and a plain value of ``source`` for some others, on those; else what was given.

    Collective over ``peers``: messages between two would be closed by gloo with all connections
    when the time-out of a wait is up, and `Peers.wait` is made of short ones.

    Raises:
        LostPeerError: when a replica is gone.
    """
    given = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()}
    head = torch.frombuffer(bytearray(json.dumps([value, given]).encode()), dtype=torch.uint8)
    head_bytes, count = peers.gather(torch.tensor([len(head), len(_packs(given))]))[source].tolist()
    found: Mapping[str, Tensor] = tensors
    for receiver in to:
        text = _move(peers, head, head_bytes, source, receiver)
        packs: list[list[str]] = [[]] * count
        kinds: Kinds = given
        if peers.rank == receiver:
            value, kinds = json.loads(text.numpy().tobytes())
            found = {}
        if peers.rank in (source, receiver):
            packs = _packs(kinds)
        for names in packs:
            sizes = [_size(kinds[name]) for name in names]
            pack = torch.empty(0, dtype=torch.uint8)
            if peers.rank == source:
                pack = torch.cat([_bytes(tensors[name]) for name in names])
            pack = _move(peers, pack, sum(sizes), source, receiver)
            if peers.rank == receiver:
                parts = pack.split(sizes)
                found = {
                    **found,
                    **{n: _tensor(p, kinds[n]) for n, p in zip(names, parts, strict=True)},
                }
    return found, value


def _move(peers: Peers, sent: Tensor, count: int, source: int, receiver: int) -> Tensor:
    """[count] Bytes of one replica, on another; elsewhere none."""
    sent_splits, received_splits = [0] * peers.size, [0] * peers.size
    if peers.rank == source:
        sent_splits[receiver] = count
    elif peers.rank == receiver:
        received_splits[source] = count
    sent = (sent if peers.rank == source else sent[:0]).to(peers.device)
    received = torch.empty(sum(received_splits), dtype=torch.uint8, device=peers.device)
    peers.wait(peers.all_to_all(received, sent, received_splits, sent_splits))
    return received.cpu()


def _packs(kinds: Kinds) -> list[list[str]]:
    """Names in order, cut where a pack is full."""
    packs: list[list[str]] = []
    size = PACK_BYTES
    for name, kind in kinds.items():
        if size >= PACK_BYTES:
            packs.append([])
            size = 0
        packs[-1].append(name)
        size += _size(kind)
    return packs


def _size(kind: tuple[str, Sequence[int]]) -> int:
    dtype, shape = kind
    return prod(shape) * int(getattr(torch, dtype).itemsize)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _tensor(data: Tensor, kind: tuple[str, Sequence[int]]) -> Tensor:
    dtype, shape = kind
    return data.clone().view(getattr(torch, dtype)).reshape(list(shape))  # aligned by the copy
