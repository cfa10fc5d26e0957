"""Who goes to a canary, and what becomes of it."""

from __future__ import annotations

import dataclasses

import pytest

from lepton_ray.config.schema import Rule
from lepton_ray.tracking.canary import Canary, Counts, Tally, add, decide, goes_to_canary

START_S, MINUTES = 1000.0, 10.0
BEFORE, AFTER = START_S + 60, START_S + 601


def canary(share: float = 0.1, **rule: float) -> Canary:
    return Canary(
        id="a",
        version=8,
        share=share,
        instead_of=7,
        started_s=START_S,
        minutes=MINUTES,
        sticky="x-session-id",
        rule=Rule(**rule),
    )


def counts(requests: int, seconds: float = 0.01, **others: int) -> Counts:
    made = Counts()
    for _ in range(requests):
        made.answered(seconds)
    return dataclasses.replace(made, **others)


def tally(of_canary: Counts, of_champion: Counts | None = None) -> Tally:
    return {8: of_canary, 7: of_champion or counts(1000)}


def test_a_caller_stays_and_the_share_is_kept() -> None:
    callers = [f"caller {n}" for n in range(20_000)]
    some = {c for c in callers if goes_to_canary(canary(0.1), c)}
    assert some == {c for c in callers if goes_to_canary(canary(0.1), c)}
    assert 0.09 < len(some) / len(callers) < 0.11
    more = {c for c in callers if goes_to_canary(canary(0.3), c)}
    assert some < more, "whoever was there stays there"
    others = {c for c in callers if goes_to_canary(dataclasses.replace(canary(0.1), id="b"), c)}
    assert len(some & others) < 0.3 * len(some), "another attempt meets others"
    assert all(goes_to_canary(canary(1.0), c) for c in callers)


@pytest.mark.parametrize(
    ("found", "now_s", "what", "said"),
    [
        (tally(counts(500)), BEFORE, "wait", "9.0 of 10 minutes are left"),
        (tally(counts(500)), AFTER, "promote", "500 requests without a broken rule"),
        (tally(counts(199)), AFTER, "wait", "199 of 200 requests"),
        ({}, AFTER, "wait", "0 of 200 requests"),
        # Every request fails: three are enough, one is not.
        (tally(counts(3, errors=3)), BEFORE, "rollback", "errors 100.0% (3 of 3)"),
        (tally(counts(2, errors=2)), BEFORE, "wait", ""),
        # 2 % of few is no proof of more than 1 %, of many it is; at the end it counts as it stands.
        (tally(counts(200, errors=4)), BEFORE, "wait", ""),
        (tally(counts(5000, errors=100)), BEFORE, "rollback", "errors 2.0% (100 of 5000)"),
        (tally(counts(200, errors=4)), AFTER, "rollback", "errors 2.0% (4 of 200)"),
        (tally(counts(200, errors=2)), AFTER, "promote", ""),
        (tally(counts(200, compared=200, agreed=100)), BEFORE, "rollback", "disagreement 50.0%"),
        (tally(counts(200, compared=200, agreed=170)), BEFORE, "wait", ""),
        (tally(counts(200, seconds=0.03)), BEFORE, "rollback", "times the champion's, at most 2"),
        (tally(counts(199, seconds=0.03)), BEFORE, "wait", ""),
        (tally(counts(500, seconds=0.03), counts(199)), AFTER, "promote", ""),
        (tally(counts(200, seconds=0.015)), BEFORE, "wait", ""),
    ],
)
def test_what_becomes_of_it(found: Tally, now_s: float, what: str, said: str) -> None:
    decision = decide(canary(), found, 7, now_s)
    assert decision.what == what, decision
    assert said in decision.reason


def test_another_champion_ends_it_and_a_version_that_cannot_be_served_is_rolled_back() -> None:
    assert decide(canary(), tally(counts(500)), 9, AFTER).what == "end"
    assert "promoted otherwise" in decide(canary(), tally(counts(500)), 8, AFTER).reason
    refused = decide(canary(), tally(counts(500)), 7, AFTER, "it takes other columns")
    assert (refused.what, refused.reason) == (
        "rollback",
        "it cannot be served: it takes other columns",
    )


def test_a_limit_of_no_error_at_all_ends_it_at_the_end() -> None:
    assert decide(canary(errors=0), tally(counts(500, errors=1)), 7, BEFORE).what == "wait"
    assert decide(canary(errors=0), tally(counts(500, errors=1)), 7, AFTER).what == "rollback"


def test_counts_add_up_and_survive_json() -> None:
    one, two = counts(99), counts(1, seconds=2.0, errors=1, compared=4, agreed=3)
    total = add([{8: one}, {8: two, 7: counts(5)}])
    assert total[8].requests == 100
    assert Counts.from_json(total[8].to_json()) == total[8]
    assert total[8].p99_s == pytest.approx(0.01, rel=0.15)
    assert counts(1, seconds=2.0).p99_s == pytest.approx(2.0, rel=0.15)
    assert one.requests == 99, "what was added stays as it was"
    assert Canary.from_json(canary().to_json()) == canary()
