"""Live replicas come, go, hang and are killed while the others train on, to the same bytes."""

from __future__ import annotations

import errno
import functools
import random
import time
from multiprocessing.connection import Client
from threading import Thread
from typing import Any

import pytest

from lepton_ray.training.membership import LeftError, live
from lepton_ray.training.membership.coordinator import Coordinator
from lepton_ray.training.membership.coordinator import _shut as shut
from lepton_ray.training.membership.generations import End, Generation, Standing, decide, held_up
from lepton_ray.training.membership.live import Live
from tests.elastic import PHASES, Kill, LiveOutcome, Member, Outcome, train, train_live
from tests.elastic import Generation as Fixed
from tests.lab import wait_for
from tests.unit.test_exactness import PAIRS, STEPS, experiment

LIVE_PHASES = (*PHASES, "enter", "heal", "measure")


def standing(id: str, **rest: Any) -> Standing:
    return Standing(id=id, guaranteed=rest.pop("guaranteed", False), **rest)


def arrived(id: str, progress: tuple[int, int] | None = None, **rest: Any) -> Standing:
    return standing(id, arrived=True, progress=progress, **rest)


def test_a_run_starts_when_the_guaranteed_replicas_are_there() -> None:
    live, first, second = arrived("c"), arrived("a", guaranteed=True), arrived("b", guaranteed=True)
    assert decide([live, first], 2) is None
    assert decide([live, first, second], 2) == Generation(
        members=("c", "a", "b"), source=0, behind=(1, 2), restore=True
    )


def test_nothing_follows_before_every_member_has_arrived() -> None:
    members = [standing("a", member=True), arrived("b", (5, 0), member=True), arrived("c")]
    assert decide(members, 1) is None


def test_those_behind_take_the_state_of_the_furthest() -> None:
    there = [
        arrived("a", (5, 0), member=True),
        arrived("b", (6, 0), member=True),
        arrived("d", (6, 0), member=True),
    ]
    assert decide(there, 1) == Generation(members=("a", "b", "d"), source=1, behind=(0,))


def test_those_without_a_state_come_last_and_take_it_while_the_others_train() -> None:
    there = [
        arrived("a"),
        arrived("b", (6, 0), member=True),
        arrived("c", guaranteed=True),
        arrived("d", (5, 0), member=True),
    ]
    assert decide(there, 1) == Generation(
        members=("b", "d", "a", "c"), source=0, behind=(1,), joining=(2, 3)
    )


def test_an_epoch_more_is_further() -> None:
    there = [arrived("a", (7, 0), member=True), arrived("b", (7, 1), member=True)]
    assert decide(there, 1) == Generation(members=("a", "b"), source=1, behind=(0,))


def test_live_replicas_train_on_without_the_guaranteed_ones_but_do_not_end_the_run() -> None:
    assert isinstance(decide([arrived("c", (5, 0), member=True)], 1), Generation)
    assert decide([arrived("c", (9, 1), member=True, done=True)], 1) is None
    both = [
        arrived("c", (9, 1), member=True, done=True),
        arrived("a", (9, 1), member=True, done=True, guaranteed=True),
    ]
    assert decide(both, 1) == End()


def test_one_that_leaves_is_no_member_of_the_next() -> None:
    there = [arrived("a", (5, 0), member=True, leaving=True), arrived("b", (5, 0), member=True)]
    following = decide(there, 1)
    assert isinstance(following, Generation)
    assert following.members == ("b",)


def test_one_that_leaves_hands_its_state_over_first() -> None:
    """Asked when it had arrived already, and the others have none."""
    there = [
        arrived("a", (5, 0), member=True, leaving=True),
        arrived("b", guaranteed=True),
        arrived("c", leaving=True),
    ]
    assert decide(there, 1) == Generation(members=("a", "b"), source=0, joining=(1,))


def enter(member: Live, progress: Any = None) -> Thread:
    """In a thread, as the others are waited for."""
    entering = Thread(target=lambda: entries.append(member.enter(None, progress)), daemon=True)
    entering.start()
    return entering


entries: list[Any] = []


def test_one_that_connects_again_is_lost_to_the_others_first() -> None:
    """Its connection broke, and the coordinator has not noticed yet."""
    coordinator = Coordinator("127.0.0.1", b"secret", minimum=2, heartbeat_s=60.0)
    entries.clear()

    def member(name: str) -> Live:
        return Live(coordinator.address, b"secret", id=name, guaranteed=True, host="127.0.0.1")

    try:
        one, other = member("one"), member("other")
        for entering in [enter(one), enter(other)]:
            entering.join(60)
        assert [entry.peers.size for entry in entries] == [2, 2]
        again = enter(member("other"))
        assert one._lost.wait(60), "or it would wait for one that waits for it"
        deadline = time.monotonic() + 60
        while not any(s.id == "other" and s.arrived for s in coordinator.connected()):
            assert time.monotonic() < deadline  # else the next generation is of one
            time.sleep(0.01)
        one._before.broken = True
        enter(one, (3, 0)).join(60)
        again.join(60)
        assert [entry.peers.size for entry in entries[2:]] == [2, 2]
    finally:
        coordinator.close()


@pytest.mark.parametrize("noticed", [True, False])
def test_one_that_was_cut_off_leaves_when_another_is_in_its_place(noticed: bool) -> None:
    """Or there would be more replicas than the run may have: its machine is not gone for good."""
    coordinator = Coordinator("127.0.0.1", b"secret", minimum=1, heartbeat_s=60.0)
    entries.clear()
    left: list[str] = []

    def member(name: str) -> Live:
        return Live(
            coordinator.address,
            b"secret",
            id=name,
            guaranteed="guaranteed" in name,
            host="127.0.0.1",
        )

    def leave(one: Live) -> None:
        with pytest.raises(LeftError):
            one.enter(None, (3, 0))
        left.append("old")

    def there() -> list[str]:
        return [s.id for s in coordinator.connected()]

    def waits(name: str) -> bool:
        return any(s.id == name and s.arrived for s in coordinator.connected())

    try:
        guaranteed, old, new = map(member, ("guaranteed 0@1", "live 0@2", "live 0@3"))
        first = enter(old)
        wait_for(lambda: waits("live 0@2"), 60)  # else the generation is of one
        for entering in (first, enter(guaranteed)):
            entering.join(60)
        assert [entry.peers.size for entry in entries] == [2, 2]
        if noticed:
            shut(coordinator._connections["live 0@2"])
            wait_for(lambda: there() == ["guaranteed 0@1"], 60)
        entering = enter(new)
        wait_for(lambda: waits("live 0@3"), 60)
        leaving = Thread(target=leave, args=(old,), daemon=True)
        leaving.start()
        leaving.join(60)
        assert left
        assert guaranteed._lost.wait(60)
        guaranteed._before.broken = True
        for one in (enter(guaranteed, (3, 0)), entering):
            one.join(60)
        assert [entry.peers.size for entry in entries[2:]] == [2, 2]
        assert there() == ["guaranteed 0@1", "live 0@3"]
    finally:
        coordinator.close()


@functools.cache
def undisturbed(model: str, optimizer: str) -> Outcome:
    return train(experiment(model, optimizer), [Fixed(1)])


def check(outcome: LiveOutcome, model: str, optimizer: str, members: Any) -> None:
    expected = undisturbed(model, optimizer)
    assert outcome.sha256 == expected.sha256, members
    assert (outcome.digest, outcome.history) == (expected.digest, expected.history), members


def starts(outcome: LiveOutcome) -> list[int]:
    return [e["replicas"] for e in outcome.events if e["kind"] == "start"]


def lost_steps(outcome: LiveOutcome) -> int:
    """Whole steps that the next generation did not go on from."""
    lost, done = 0, 0
    for event in outcome.events:
        if event["kind"] == "step":
            done = max(done, event["step"])
        elif event["kind"] == "start":
            lost += max(0, done - event["step"])
    return lost


def schedule(seed: int) -> list[Member]:
    rng = random.Random(seed)
    members = [Member() for _ in range(rng.randint(1, 2))]
    for _ in range(rng.randint(1, 4)):
        joins_at = rng.choice([0, 0, rng.randint(1, STEPS - 3)])
        end = rng.randint(joins_at, STEPS - 1)
        fate = rng.choice(["kill", "kill", "leave", "stay"])
        kill = Kill(-1, end, rng.choice(LIVE_PHASES)) if fate == "kill" else None
        members.append(Member(joins_at, kill, end if fate == "leave" else None))
    rng.shuffle(members)
    return members


def keep_the_bytes(seed: int) -> None:
    """A random schedule; where it is odd, states travel tensor by tensor."""
    model, optimizer = PAIRS[seed % len(PAIRS)]
    members = schedule(seed)
    outcome = train_live(experiment(model, optimizer), members, part_bytes=seed % 2 or None)
    check(outcome, model, optimizer, members)


def test_joining_and_leaving_lose_no_step() -> None:
    members = [Member(), Member(joins_at=3), Member(leaves_at=7)]
    outcome = train_live(experiment("cnn", "adamw"), members)
    check(outcome, "cnn", "adamw", members)
    assert max(starts(outcome)) == 3
    assert starts(outcome)[-1] == 2
    assert lost_steps(outcome) == 0


LARGE = {"epochs": 4, "ema": 0.9, "early_stop": {"metric": "val_loss", "patience": 5}, "clip": 0.5}


@pytest.mark.parametrize("fate", ["stays", "is killed", "its source is killed"])
def test_a_state_comes_in_parts_while_the_others_train(fate: str) -> None:
    """One tensor at each boundary: over the end of an epoch, a link of the digest, a checkpoint."""
    asked = experiment("cnn", "adamw", digest_every=2, **LARGE)
    source = Member(kill=Kill(-1, 7, "heal")) if fate == "its source is killed" else Member()
    joiner = Member(joins_at=2, kill=Kill(-1, 7, "heal") if fate == "is killed" else None)
    outcome = train_live(asked, [source, Member(), joiner], part_bytes=1)
    expected = train(asked, [Fixed(1)])
    assert outcome.sha256 == expected.sha256
    assert (outcome.digest, outcome.history) == (expected.digest, expected.history)
    joined = [e for e in outcome.events if e["kind"] == "joined"]
    assert lost_steps(outcome) == 0
    if fate == "stays":
        (event,) = joined
        assert event["hosts"] == 3
        (began,) = [e["step"] for e in outcome.events if e["kind"] == "start"][1:]
        assert event["step"] - began == event["parts"] - 1 > 7, "one part a step"
        steps = [e for e in outcome.events if e["kind"] == "step" and e["number"] == 2]
        shares = {(e["step"] > event["step"], e["hosted"] > 0) for e in steps}
        assert shares == {(False, False), (True, True)}, "then it does its share"
    else:
        assert not [e for e in joined if e["step"] <= 7]


def test_one_whose_state_came_in_part_starts_anew_when_all_others_are_gone() -> None:
    """There is no checkpoint, and what it has is void."""
    asked = experiment("cnn", "adamw", checkpoint={"every_s": 1e9, "every_steps": 10**9})
    members = [Member(kill=Kill(-1, 7, "heal")), Member(joins_at=2)]
    outcome = train_live(asked, members, part_bytes=1)
    assert outcome.sha256 == train(asked, [Fixed(1)]).sha256
    assert [e["step"] for e in outcome.events if e["kind"] == "start"][-1] == 0


def test_one_that_leaves_hands_all_over_that_has_not_arrived() -> None:
    members = [Member(leaves_at=12), Member(joins_at=2)]
    outcome = train_live(experiment("cnn", "adamw"), members, pause_s=0.1, part_bytes=1)
    check(outcome, "cnn", "adamw", members)
    (event,) = (e for e in outcome.events if e["kind"] == "joined")
    (began,) = [e["step"] for e in outcome.events if e["kind"] == "start" and e["replicas"] == 2]
    assert began < event["step"] < began + event["parts"] - 1
    assert lost_steps(outcome) == 0


@pytest.mark.parametrize("phase", ["forward", "gather", "optimizer", "measure"])
def test_the_loss_of_replica_0_costs_the_step_in_flight(phase: str) -> None:
    members = [Member(kill=Kill(0, 7, phase)), Member(), Member()]
    outcome = train_live(experiment("cnn", "sgd"), members)
    check(outcome, "cnn", "sgd", members)
    assert lost_steps(outcome) == 0, "only the step in flight is done again"
    assert starts(outcome)[-1] == 2


def test_one_that_hangs_is_dropped_and_comes_back() -> None:
    members = [Member(), Member(stopped_at=4)]
    outcome = train_live(experiment("mlp", "sgd"), members, pause_s=0.1)
    check(outcome, "mlp", "sgd", members)
    reasons = [e["reason"] for e in outcome.events if e["kind"] == "resize"]
    assert reasons == ["replica 1 silent for 1 s", "replica 1 joined"]


def test_one_that_trains_alone_notices_that_it_was_dropped() -> None:
    """Or nobody could join it any more: it waits for no other, and so not in vain."""
    members = [Member(stopped_at=4), Member(joins_at=8)]
    outcome = train_live(experiment("mlp", "sgd"), members, pause_s=0.1)
    check(outcome, "mlp", "sgd", members)
    assert starts(outcome) == [1, 1, 2]
    joined = [e for e in outcome.events if e["kind"] == "start"][-1]
    assert joined["step"] < joined["steps"]


def test_a_network_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was cut off hears that there is no way to the coordinator, until there is."""
    coordinator = Coordinator("127.0.0.1", b"secret", minimum=1)
    tries: list[Any] = []

    def connect(*address: Any, **options: Any) -> Any:
        tries.append(address)
        if len(tries) < 3:
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return Client(*address, **options)

    monkeypatch.setattr(live, "Client", connect)
    try:
        here = Live(coordinator.address, b"secret", id="a", guaranteed=True, host="127.0.0.1")
        entry = here.enter({}, None)
    finally:
        coordinator.close()
    assert entry is not None
    assert entry.peers.size == 1
    assert len(tries) == 3


def test_one_that_holds_the_others_up_is_reported_once() -> None:
    members = [Member(), Member(slow=True), Member()]
    outcome = train_live(experiment("mlp", "sgd"), members)
    check(outcome, "mlp", "sgd", members)
    (reason,) = (e["reason"] for e in outcome.events if e["kind"] == "straggler")
    assert reason.startswith("replica 1 holds the others up: 0.1")


def test_who_holds_others_up_takes_far_longer_than_they() -> None:
    there = [standing(n, member=True, shard_s=s) for n, s in (("a", 1.0), ("b", 1.4), ("c", 2.0))]
    assert [held_up(there, s.id) for s in there] == [None, None, 1.2]
    assert held_up(there[:1], "a") is None, "alone"
    assert held_up([*there, standing("d", shard_s=9.0)], "d") is None, "no member"


def test_one_that_computes_wrongly_is_outvoted_and_its_steps_are_done_again() -> None:
    """Wrong after step 4, found at the link of step 5, in which all have its gradients."""
    asked = experiment("mlp", "sgd", digest_every=5)
    members = [Member(corrupt=True), Member(), Member()]
    outcome = train_live(asked, members)
    expected = train(asked, [Fixed(1)])
    assert outcome.sha256 == expected.sha256
    assert (outcome.digest, outcome.history) == (expected.digest, expected.history)
    (reason,) = (e["reason"] for e in outcome.events if e["kind"] == "outvoted")
    assert "different bytes at step 5, first in 1.weight" in reason
    assert reason.endswith("2 others agree")
    began = [e["step"] for e in outcome.events if e["kind"] == "start"]
    assert began[-1] == 0, "the checkpoint of step 3 was not checked yet"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_live_soak(seed: int) -> None:
    keep_the_bytes(seed)
