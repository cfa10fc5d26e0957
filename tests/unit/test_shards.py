"""The tree over shards: any block structure gives the sum of the one tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ray.training.shards import block, children, combine, covering, merges

SIZES = st.integers(1, 64).flatmap(lambda s: st.tuples(st.just(s), st.integers(1, s)))


def oracle(leaves: np.ndarray) -> np.float32:
    """All leaves gathered and summed in the tree, in one place."""
    if len(leaves) == 1:
        return leaves[0]
    (_, middle), _ = children((0, len(leaves)))
    return np.float32(oracle(leaves[:middle]) + oracle(leaves[middle:]))


@given(SIZES)
def test_blocks_host_every_shard_once_and_evenly(size: tuple[int, int]) -> None:
    shards, replicas = size
    blocks = [block(r, replicas, shards) for r in range(replicas)]
    assert [s for b in blocks for s in b] == list(range(shards))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@given(SIZES, st.integers(0, 2**32 - 1))
def test_any_number_of_replicas_gives_the_bits_of_the_oracle(
    size: tuple[int, int], seed: int
) -> None:
    shards, replicas = size
    rng = np.random.default_rng(seed)
    leaves = (rng.standard_normal(shards) * 10.0 ** rng.uniform(-4, 4, shards)).astype(np.float32)
    sums: dict[tuple[int, int], np.float32] = {}
    for replica in range(replicas):
        hosted = block(replica, replicas, shards)
        stack: list[np.float32] = []
        for shard, additions in zip(hosted, merges(hosted, shards), strict=True):
            stack.append(leaves[shard])
            for _ in range(additions):
                right = stack.pop()
                stack[-1] = np.float32(stack[-1] + right)
            assert len(stack) <= len(hosted).bit_length() + 1 + len(covering(hosted, shards))
        sums.update(zip(covering(hosted, shards), stack, strict=True))
    assert combine(sums, shards, lambda a, b: np.float32(a + b)) == oracle(leaves)


def test_a_left_fold_is_not_the_tree() -> None:
    """The control: the order matters, so the equality above says something."""
    leaves = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    fold = leaves[0]
    for leaf in leaves[1:]:
        fold = np.float32(fold + leaf)
    assert fold != oracle(leaves)


def test_blocks_that_are_subtrees_send_one_sum() -> None:
    assert [covering(block(r, 4, 16), 16) for r in range(4)] == [
        [(0, 4)],
        [(4, 8)],
        [(8, 12)],
        [(12, 16)],
    ]


def test_more_replicas_than_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="replicas <= shards"):
        block(0, 5, 4)
