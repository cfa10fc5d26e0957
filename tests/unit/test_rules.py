"""Which trials are stopped."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from lepton_ray.tuning.rules import Hyperband, Median, Successive
from tests.studies import Player, experiment


def tell(rule: Successive, number: int, epoch: int, value: float) -> str:
    stop = rule.judge(number, epoch, value)
    rule.note(number, epoch, value, bool(stop))
    return stop


@pytest.mark.parametrize(
    ("epochs", "rungs"),
    [(1, []), (2, [1]), (9, [1, 3]), (18, [2, 6]), (27, [3, 9]), (100, [11, 33])],
)
def test_rungs_are_a_factor_of_three_apart_in_the_first_half(epochs: int, rungs: list[int]) -> None:
    assert list(Successive(epochs).rungs) == rungs


def test_the_best_third_goes_on() -> None:
    rule = Successive(9)
    for number, value in enumerate([0.5, 0.6, 0.7, 0.4, 0.45, 0.9]):
        tell(rule, number, 1, value)
    assert tell(rule, 6, 1, 0.41) == "", "second of seven"
    assert tell(rule, 7, 1, 0.42) == "3 of 8 at epoch 1"


def test_the_second_at_a_rung_must_be_better_than_the_first() -> None:
    rule = Successive(9)
    assert tell(rule, 0, 1, 0.5) == ""
    assert tell(rule, 1, 1, 0.6) == "2 of 2 at epoch 1"
    assert tell(rule, 2, 1, 0.4) == ""


def test_the_first_at_a_rung_has_no_free_pass() -> None:
    rule = Successive(9)
    tell(rule, 0, 1, 0.9)  # alone: there is nothing to judge it by
    for number, value in ((1, 0.5), (2, 0.6), (3, 0.4)):
        tell(rule, number, 1, value)
    assert tell(rule, 0, 3, 0.85) == "4 of 4 at epoch 1"
    assert rule.rungs[3] == {}, "and it does not count where it was not let in"
    assert tell(rule, 3, 3, 0.3) == ""


def test_who_begins_as_one_of_the_five_best_that_finished_goes_on() -> None:
    rule = Successive(9)
    for number, (early, end) in enumerate(
        [(0.5, 0.30), (0.45, 0.21), (0.4, 0.25), (0.35, 0.24), (0.3, 0.23), (0.25, 0.22)]
    ):
        assert tell(rule, number, 1, early) == tell(rule, number, 3, early) == ""
        if number < 5:
            rule.finish(number, end)
    assert tell(rule, 6, 1, 0.5) == "", "as trial 0, one of the five"
    assert tell(rule, 7, 1, 0.51) == "8 of 8 at epoch 1"
    rule.finish(5, 0.22)  # and trial 0 is none of the five any more
    assert tell(rule, 8, 1, 0.5) == "6 of 9 at epoch 1"
    assert tell(rule, 9, 1, 0.45) == ""


def test_fewer_than_five_finished_trials_are_no_example() -> None:
    rule = Successive(9)
    for number in range(4):
        tell(rule, number, 1, 0.5 - number / 10)
        rule.finish(number, 0.1)
    assert tell(rule, 4, 1, 0.45) == "4 of 5 at epoch 1"
    rule.finish(9, 0.05)  # before the first rung, by patience: nothing to hold others against
    assert tell(rule, 5, 1, 0.45) == "", "as trial 0"
    assert tell(rule, 6, 1, 0.55) == "7 of 7 at epoch 1"


def test_nothing_is_decided_between_rungs() -> None:
    rule = Successive(9)
    tell(rule, 0, 1, 0.1)
    assert rule.judge(1, 2, 9.0) == ""
    assert [e for e in range(1, 9) if rule.decides_at(0, e)] == [1, 3]


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_some_trial_always_finishes_and_most_do_not(
    tmp_path: Path, scheduler: str, slots: int
) -> None:
    for seed in range(4):
        noise = random.Random(seed)
        table = [[noise.random() for _ in range(28)] for _ in range(40)]
        asked = experiment(epochs=27, scheduler=scheduler, trials=40, seed=seed)
        played = Player(
            asked,
            tmp_path / str(seed),
            slots=slots,
            order=seed,
            play=lambda p, e, t=table: t[int(p["train.optimizer.lr"] * 1e6) % 40][e],
        ).go()
        states = [r.state for r in played.journal.finished]
        assert states.count("finished") >= 1
        assert states.count("pruned") >= 15
        assert len(states) == 40


def test_hyperband_has_as_many_trials_a_bracket_as_the_paper() -> None:
    rule = Hyperband(27)
    firsts = [next(e for e in range(1, 27) if rule.decides_at(n, e)) for n in range(9 + 5 + 3)]
    assert [firsts.count(first) for first in (1, 3, 9)] == [9, 5, 3]


def test_the_median_rule_needs_three_others() -> None:
    rule = Median()
    for number, curve in enumerate([(0.5, 0.4), (0.6, 0.5), (0.7, 0.6)]):
        assert rule.judge(number, 1, 9.9) == ""
        for epoch, value in enumerate(curve, 1):
            rule.note(number, epoch, value, stopped=False)
    assert rule.judge(3, 1, 0.61) == "worse than the median of 3 at epoch 1"
    assert rule.judge(3, 1, 0.59) == ""
    rule.note(3, 1, 0.4, stopped=False)
    assert rule.judge(3, 2, 9.0) == "", "its best so far counts"


def test_a_curve_that_is_no_number_does_not_stop_the_rule() -> None:
    rule = Median()
    for number, value in enumerate([0.5, math.nan, 0.6, 0.7]):
        rule.note(number, 1, value, stopped=False)
    assert rule.judge(4, 1, 0.9).startswith("worse than the median")
    assert rule.judge(4, 1, math.nan).startswith("worse than the median")
    assert rule.judge(4, 1, 0.55) == ""


def test_not_a_number_stops_at_once(tmp_path: Path) -> None:
    played = Player(
        experiment(trials=3, scheduler="asha"), tmp_path, play=lambda p, e: math.nan
    ).go()
    assert [(r.state, len(r.values), r.reason) for r in played.journal.finished] == [
        ("failed", 1, "val_loss is nan")
    ] * 3
