"""Fingerprints of training state: what "the same bytes" means, and who differs first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, little-endian and row by row, without a copy where it is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def link(previous: str, step: int, tensors: Iterable[Tensor]) -> str:
    """The next link of a chained digest, over the tensors of ``step`` and all links before."""
    digest = hashlib.sha256(f"{previous}|{step}".encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def first_broken_link(ours: list[tuple[int, str]], theirs: list[tuple[int, str]]) -> int | None:
    """The first step at which two chains differ; None when they are equal."""
    for (step, link), (other_step, other_link) in zip(ours, theirs, strict=False):
        if (step, link) != (other_step, other_link):
            return min(step, other_step)
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        return longer[min(len(ours), len(theirs))][0]
    return None


def outvoted(links: Sequence[str]) -> list[int]:
    """Ranks whose link is not that of more than half of all; none where no link has so many."""
    link, votes = Counter(links).most_common(1)[0]
    if 2 * votes <= len(links):
        return []
    return [rank for rank, other in enumerate(links) if other != link]


def first_difference(digests: list[list[str]], names: list[str]) -> str | None:
    """Name of the first tensor whose digest is not the same on every replica.

    Args:
        digests: [replicas][tensors]
        names: [tensors]
    """
    for position, name in enumerate(names):
        if len({row[position] for row in digests}) > 1:
            return name
    return None
