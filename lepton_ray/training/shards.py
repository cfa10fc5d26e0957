"""Shards and the fixed tree that adds them: pure functions of counts.

A run has ``shards`` logical workers for its whole life. Replica r of P hosts the contiguous block
``block(r, P, shards)``. Gradients are added in one fixed binary tree over all shards, so that the
sum never depends on how the shards are spread over replicas: a replica adds up the whole subtrees
that lie in its block (`covering`), and the rest of the tree is added from those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Node = tuple[int, int]
"""A subtree: shards ``start <= s < stop``."""

T = TypeVar("T")


def block(replica: int, replicas: int, shards: int) -> range:
    """The shards one replica hosts; every shard is hosted once.

    Raises:
        ValueError: when there are more replicas than shards.
    """
    if not 0 <= replica < replicas <= shards:
        raise ValueError(
            f"0 <= replica < replicas <= shards must hold, got {replica}, {replicas}, {shards}"
        )
    return range(replica * shards // replicas, (replica + 1) * shards // replicas)


def children(node: Node) -> tuple[Node, Node]:
    """Split at the largest power of two below the size, so that the tree is fixed by its size."""
    start, stop = node
    middle = start + (1 << ((stop - start - 1).bit_length() - 1))
    return (start, middle), (middle, stop)


def covering(hosted: range, shards: int) -> list[Node]:
    """The largest whole subtrees inside a block, left to right; one if the block is a subtree."""
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        start, stop = node
        if start >= hosted.stop or stop <= hosted.start:
            return
        if hosted.start <= start and stop <= hosted.stop:
            nodes.append(node)
            return
        for child in children(node):
            visit(child)

    visit((0, shards))
    return nodes


def merges(hosted: range, shards: int) -> list[int]:
    """[len(hosted)] How many additions follow each shard when a block is summed on a stack.

    Shard by shard, push its values; then so many times pop two, add them, push the sum. At the end
    the stack holds the sums of `covering`. At most log2(len(hosted)) + 1 values live at a time.
    """
    counts = [0] * len(hosted)

    def visit(node: Node) -> None:
        if node[1] - node[0] > 1:
            for child in children(node):
                visit(child)
            counts[node[1] - 1 - hosted.start] += 1

    for node in covering(hosted, shards):
        visit(node)
    return counts


def combine(sums: Mapping[Node, T], shards: int, add: Callable[[T, T], T]) -> T:
    """The whole tree's sum from the sums of subtrees that cover it."""

    def value(node: Node) -> T:
        if node in sums:
            return sums[node]
        left, right = children(node)
        return add(value(left), value(right))

    return value((0, shards))
