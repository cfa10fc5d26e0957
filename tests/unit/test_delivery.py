"""States travel whole, whatever their size and however long it takes; replicas are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from lepton_ray.training.membership import LostPeerError, delivery
from lepton_ray.training.membership.peers import LOOK_S, Peers

STATE = {
    "weights": torch.randn(1000, 30),
    "half": torch.randn(7).to(torch.bfloat16),
    "count": torch.tensor(2**40 + 1),
    "mask": torch.tensor([True, False, True]),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
}
VALUES = {"step": 7, "history": [{"loss": 0.1}]}


def on_all(size: int, work: Callable[[Peers], Any], lost: threading.Event | None = None) -> list:
    store = HashStore()

    def replica(rank: int) -> Any:
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=60)
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        group = ProcessGroupGloo(store, rank, size, options)
        return work(Peers(group, lost=lost or threading.Event()))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(replica, range(size)))


@pytest.mark.parametrize("pack_bytes", [1, 1000, 1 << 20])
def test_those_behind_have_it_and_the_others_keep_theirs(
    monkeypatch: pytest.MonkeyPatch, pack_bytes: int
) -> None:
    monkeypatch.setattr(delivery, "PACK_BYTES", pack_bytes)

    def replica(peers: Peers) -> Any:
        own = (STATE, VALUES) if peers.rank == 2 else ({}, {"of": peers.rank})
        return delivery.deliver(peers, *own, 2, [0, 3])

    found = on_all(4, replica)
    for rank in (0, 3):
        tensors, values = found[rank]
        assert values == VALUES
        assert list(tensors) == list(STATE)
        for name, tensor in STATE.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    assert found[1] == ({}, {"of": 1})


def test_a_source_that_takes_long_is_waited_for() -> None:
    """gloo would close all connections at the first time-out of a wait for a single message."""

    def replica(peers: Peers) -> Any:
        if peers.rank == 0:
            time.sleep(3 * LOOK_S)
            return delivery.deliver(peers, STATE, VALUES, 0, [1])
        return delivery.deliver(peers, {}, {}, 0, [1])

    assert torch.equal(on_all(2, replica)[1][0]["weights"], STATE["weights"])


def test_a_source_that_is_lost_is_not_waited_for() -> None:
    lost, heard = threading.Event(), threading.Event()

    def replica(peers: Peers) -> str:
        if peers.rank == 0:
            lost.set()
            assert heard.wait(60)  # it hangs: its connections stay open
            return "lost"
        with pytest.raises(LostPeerError):
            delivery.deliver(peers, {}, {}, 0, [1])
        heard.set()
        return "heard"

    assert on_all(2, replica, lost) == ["lost", "heard"]
