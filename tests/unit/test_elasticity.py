"""Decisions about size and failure, from plain values."""

from __future__ import annotations

import pickle

import pytest

from lepton_ray.training.elasticity import (
    Failure,
    NodeView,
    decide_failure,
    decide_resize,
    decide_start,
    possible_workers,
)

ONE = {"CPU": 1.0}


def node(cpus: float, ours: int = 0, draining: bool = False, gpus: float = 0, **rest) -> NodeView:
    return NodeView(id="n", free={"CPU": cpus, "GPU": gpus}, ours=ours, draining=draining, **rest)


@pytest.mark.parametrize(
    ("nodes", "each", "expected"),
    [
        ([], ONE, 0),
        ([node(0.9)], ONE, 0),
        ([node(2.5), node(1)], ONE, 3),
        ([node(0, ours=2), node(1)], ONE, 3),
        ([node(4, draining=True), node(1)], ONE, 1),
        ([node(4, for_group=False), node(1)], ONE, 1),
        ([node(8, gpus=1)], {"CPU": 2.0, "GPU": 1.0}, 1),
        ([node(1.5), node(1.5)], {"CPU": 2.0}, 0),
    ],
)
def test_room_is_counted_node_by_node(nodes: list, each: dict, expected: int) -> None:
    assert possible_workers(nodes, each) == expected


@pytest.mark.parametrize(
    ("nodes", "current", "minimum", "size"),
    [
        ([node(0, ours=2)], 2, 1, None),  # nothing has changed
        ([node(0, ours=2), node(1)], 2, 1, 3),  # a node was added
        ([node(0, ours=2), node(9)], 2, 1, 4),  # never above the maximum
        ([node(0, ours=1), node(0, ours=1, draining=True)], 2, 1, 1),  # leave the draining node
        ([node(1, ours=1), node(0, ours=1, draining=True)], 2, 1, 2),  # move to a free place
        ([node(0, ours=1), node(0, ours=1, draining=True)], 2, 2, None),  # stay until it is gone
        ([node(0, ours=2), node(3, draining=True)], 2, 1, None),  # others' drains do not matter
    ],
)
def test_resize(nodes: list, current: int, minimum: int, size: int | None) -> None:
    resize = decide_resize(nodes, ONE, current=current, minimum=minimum, maximum=4, live=0)
    assert (resize.size if resize else None) == size


def test_a_group_leaves_a_draining_node_to_live_replicas() -> None:
    drained = [node(0), node(0, ours=1, draining=True)]
    assert decide_resize(drained, ONE, current=1, minimum=1, maximum=1, live=0) is None
    resize = decide_resize(drained, ONE, current=1, minimum=1, maximum=1, live=1)
    assert resize is not None
    assert resize.size == 1


def test_a_start_waits_for_the_minimum() -> None:
    assert decide_start([node(1)], ONE, minimum=2, maximum=4) is None
    assert decide_start([node(3)], ONE, minimum=2, maximum=4) == 3
    assert decide_start([node(9)], ONE, minimum=2, maximum=4) == 4


def test_lost_workers_are_replaced_while_training_gets_on() -> None:
    earlier: list[Failure] = []
    for step in range(0, 100, 10):
        failure = Failure(step=step, exception="")
        assert decide_failure(failure, earlier).retry
        earlier.append(failure)


def test_deaths_without_progress_end_the_run() -> None:
    stuck = Failure(step=7, exception="")
    assert decide_failure(stuck, [stuck] * 2).retry
    verdict = decide_failure(stuck, [stuck] * 3)
    assert not verdict.retry
    assert verdict.reason == "failed 4 times without getting past step 7"


def test_an_exception_is_tried_once_more_and_not_twice() -> None:
    bug = Failure(step=7, exception="IndexError: 3")
    assert decide_failure(bug, []).retry
    assert decide_failure(bug, [Failure(step=7, exception="")]).retry
    assert decide_failure(Failure(step=8, exception="IndexError: 3"), [bug]).retry
    assert decide_failure(bug, [bug]).reason == "the same exception twice at step 7"


def test_exceptions_that_read_otherwise_each_time_end_too() -> None:
    """Such as those that name an address in memory."""
    earlier = [Failure(step=7, exception=f"KeyError: <object at 0x{n}>") for n in range(3)]
    assert decide_failure(Failure(step=7, exception="KeyError: <object at 0x9>"), earlier[:2]).retry
    assert not decide_failure(Failure(step=7, exception="KeyError: 0x9"), earlier).retry


def test_own_errors_are_final() -> None:
    assert not decide_failure(Failure(step=1, exception="diverged", fatal=True), []).retry


def test_a_replica_error_crosses_processes() -> None:
    from lepton_ray.training.crew import ReplicaError

    error = pickle.loads(pickle.dumps(ReplicaError(3, "text", True, False)))
    assert (error.step, str(error), error.connection, error.fatal) == (3, "text", True, False)
