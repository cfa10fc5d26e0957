"""What a study decides, and that it decides the same after a restart. No cluster."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import TPESampler

from lepton_ray.errors import ClusterError, StudyError
from lepton_ray.jobs import prices
from lepton_ray.tuning import results, searcher
from lepton_ray.tuning.journal import Journal, Prior
from lepton_ray.tuning.population import Member, next_generation
from lepton_ray.tuning.rules import Successive
from tests.studies import LR, OWN, SPACE, KilledError, Player, decided, experiment, loss

CONDITIONAL = {
    "train.optimizer.name": {"choice": ["sgd", "adamw"]},
    "train.optimizer.momentum": {"uniform": [0, 0.9], "when": {"train.optimizer.name": "sgd"}},
    LR: {"loguniform": [1e-4, 1e-1]},
}
PBT: dict[str, Any] = {
    "searcher": "pbt", "space": {LR: SPACE[LR]}, "population": {"size": 4, "every": 3}
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"searcher": "tpe", "scheduler": "asha", "trials": 20},
    {"searcher": "tpe", "scheduler": "hyperband", "trials": 14, "space": CONDITIONAL},
    {"searcher": "multivariate_tpe", "scheduler": "asha", "trials": 14},
    {"searcher": "multivariate_tpe", "scheduler": "none", "trials": 9, "space": CONDITIONAL},
    {"searcher": "random", "scheduler": "median", "trials": 12},
    {"searcher": "gp", "scheduler": "asha", "trials": 9},
    {"searcher": "cmaes", "scheduler": "none", "trials": 16, "space": {
        LR: SPACE[LR], "train.clip": {"uniform": [0.1, 9]}}},
    PBT,
    {"searcher": "grid", "scheduler": "asha", "space": {
        LR: {"choice": [0.1, 0.01, 0.001]}, "model.width": {"randint": [6, 8]}}},
    {"searcher": "tpe", "trials": 6, "confirm": {"top": 2, "seeds": 2}},
]  # fmt: skip


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", KINDS, ids=lambda t: f"{t['searcher']}-{t.get('scheduler')}")
def test_killed_at_any_moment_a_study_goes_on_with_the_same_decisions(
    tmp_path: Path, tune: dict[str, Any]
) -> None:
    asked = experiment(epochs=6 if tune["searcher"] == "pbt" else 4, **tune)
    whole = Player(asked, tmp_path / "whole").go()
    moments = len(whole.heard)
    for number, patience in enumerate(range(1, moments, max(1, moments // 10))):
        folder = tmp_path / str(number)
        with pytest.raises(KilledError):
            Player(asked, folder, patience=patience).go()
        with pytest.raises(KilledError):  # and once more, soon after
            Player(asked, folder, patience=2).go()
        again = Player(asked, folder).go()
        assert decided(again.journal) == decided(whole.journal), f"killed after {patience}"


@pytest.mark.parametrize(
    "tune", [k for k in KINDS if k["searcher"] not in ("gp", "cmaes")], ids=lambda t: t["searcher"]
)
def test_with_two_slots_every_recorded_decision_is_the_same_after_a_restart(
    tmp_path: Path, tune: dict[str, Any]
) -> None:
    asked = experiment(**tune)
    for patience in (4, 11, 23, 37):
        folder = tmp_path / str(patience)
        with pytest.raises(KilledError):
            Player(asked, folder, slots=2, order=1, patience=patience).go()
        before = decided(Journal(folder))
        again = Player(asked, folder, slots=2, order=2).go()
        for old, new in zip(before, decided(again.journal), strict=True):
            assert new[: len(old)] == old
        heard = [what[1:] for what in again.heard if what[0] == "report"]
        recorded = {(n, e): stop for n, e, _, stop in before[1]}
        assert all(stop == recorded.get((n, e), stop) for n, e, stop in heard)
        numbers = [r.number for r in again.journal.finished]
        assert sorted(numbers) == list(range(len(again.journal.starts))), "none lost, none twice"


def test_a_population_does_not_depend_on_who_is_faster(tmp_path: Path) -> None:
    asked = experiment(**PBT)
    one = Player(asked, tmp_path / "1").go().journal
    many = Player(asked, tmp_path / "3", slots=3, order=7).go().journal
    assert {n: s.params for n, s in one.starts.items()} == {
        n: s.params for n, s in many.starts.items()
    }


def test_a_journal_of_another_space_is_refused(tmp_path: Path) -> None:
    Player(experiment(trials=1), tmp_path).go()
    with pytest.raises(StudyError, match="another space .space was .*model.width"):
        Player(experiment(space={LR: {"loguniform": [1e-4, 1e-2]}}), tmp_path)


def test_more_trials_go_on_where_the_study_ended(tmp_path: Path) -> None:
    asked = experiment(searcher="tpe", trials=8)
    Player(asked, tmp_path / "split").go()
    split = Player(asked, tmp_path / "split", more=6).go()
    whole = Player(asked, tmp_path / "whole", more=6).go()
    assert decided(split.journal) == decided(whole.journal)
    assert len(split.journal.finished) == 14


# --- what is searched ----------------------------------------------------------------------------


def test_the_experiments_own_values_come_first(tmp_path: Path) -> None:
    journal = Player(experiment(trials=2), tmp_path).go().journal
    assert journal.starts[0].params == OWN
    assert journal.starts[1].params != OWN


def test_a_setting_is_searched_only_where_its_condition_holds(tmp_path: Path) -> None:
    space = {
        **CONDITIONAL,
        "train.optimizer.nesterov": {
            "choice": [True, False],
            "when": {"train.optimizer.name": "sgd", "train.optimizer.momentum": [0.0]},
        },
    }
    journal = Player(experiment(searcher="tpe", trials=25, space=space), tmp_path).go().journal
    names = [s.params["train.optimizer.name"] for s in journal.starts.values()]
    assert set(names) == {"sgd", "adamw"}
    for start in journal.starts.values():
        is_sgd = start.params["train.optimizer.name"] == "sgd"
        assert ("train.optimizer.momentum" in start.params) == is_sgd
        assert "train.optimizer.nesterov" not in start.params, "momentum is never exactly 0"


def test_a_grid_is_every_combination_once_and_ends(tmp_path: Path) -> None:
    space = {
        "model.width": {"choice": [8, 16]},
        LR: {"quniform": [0.1, 0.3, 0.1]},
        "train.clip": {"choice": [1.0, 2.0], "when": {"model.width": 8}},
    }
    asked = experiment(searcher="grid", scheduler="none", trials=99, space=space)
    journal = Player(asked, tmp_path).go().journal
    found = [tuple(s.params.values()) for s in journal.starts.values()]
    assert len(found) == len(set(found)) == 2 * 3 + 3
    assert [round(v[1], 6) for v in found[-3:]] == [0.1, 0.2, 0.3]


def test_guided_searchers_end_nearer_to_the_best_than_chance(tmp_path: Path) -> None:
    def found(searcher: str) -> float:
        values = []
        for seed in range(3):
            asked = experiment(epochs=1, searcher=searcher, trials=40, seed=seed)
            journal = Player(asked, tmp_path / f"{searcher}{seed}").go().journal
            best = results.best(asked.tune, journal.finished)  # type: ignore[arg-type]
            assert best is not None
            values.append(best.values[-1])
        return sum(values)

    assert max(found("tpe"), found("multivariate_tpe")) < found("random")


def test_a_sampler_that_is_told_the_space_proposes_what_optunas_own_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(searcher="multivariate_tpe", trials=25)
    told = Player(asked, tmp_path / "told", slots=2).go().journal
    monkeypatch.setattr(
        searcher.MultivariateTpe,
        "infer_relative_search_space",
        TPESampler.infer_relative_search_space,
    )
    gathered = Player(asked, tmp_path / "gathered", slots=2).go().journal
    assert decided(told) == decided(gathered)


def test_one_setting_at_a_time_is_optunas_own_estimate_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours reads each setting's estimate off Optuna's estimate of all: it must be the same."""
    compared = 0

    def compare(
        study: optuna.Study, space: dict[str, Any], below: list[Any], above: list[Any],
        candidates: dict[str, Any], taken: dict[str, Any],
    ) -> None:  # fmt: skip
        nonlocal compared
        alone = TPESampler(multivariate=False, seed=0)
        for name, where in space.items():
            good, bad = (
                alone._build_parzen_estimator(study, {name: where}, trials, handle_below=h)
                for trials, h in ((below, True), (above, False))
            )
            score = good.log_pdf({name: candidates[name]}) - bad.log_pdf({name: candidates[name]})
            assert where.to_internal_repr(taken[name]) == candidates[name][score.argmax()]
            compared += 1

    class Spy(searcher.Tpe):
        def _sample(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            self.split: list[Any] = []
            taken = super()._sample(study, trial, search_space)
            compare(study, search_space, *self.split, self.candidates, taken)
            return taken

        def _build_parzen_estimator(
            self, study: Any, search_space: Any, trials: Any, handle_below: bool
        ) -> Any:
            self.split.append(trials)
            return super()._build_parzen_estimator(study, search_space, trials, handle_below)

        def _compute_acquisition_func(self, samples: Any, *both: Any) -> Any:
            self.candidates = {name: values.copy() for name, values in samples.items()}
            return super()._compute_acquisition_func(samples, *both)

    monkeypatch.setattr(searcher, "Tpe", Spy)
    space = {**SPACE, "train.batch": {"choice": [16, 32, 64]}}
    Player(experiment(searcher="tpe", trials=25, space=space), tmp_path, slots=2).go()
    assert compared >= 3 * 10


def test_a_population_takes_over_from_its_best(tmp_path: Path) -> None:
    asked = experiment(**PBT)
    journal = Player(asked, tmp_path).go().journal
    assert len(journal.finished) == 4 * 3
    for number, start in journal.starts.items():
        if number < 4:
            assert start.parent is None
            continue
        assert start.parent is not None
        assert start.parent // 4 == number // 4 - 1, "from the generation before"
    copied = [
        s for n, s in journal.starts.items() if s.parent is not None and s.parent % 4 != n % 4
    ]
    assert len(copied) == 2, "one of four after each of two generations"
    for start in copied:
        before = range(start.parent // 4 * 4, start.parent // 4 * 4 + 4)
        assert start.parent == min(before, key=lambda n: journal.ended[n].values[-1])


def test_a_member_that_failed_is_replaced_and_all_failed_is_the_end(tmp_path: Path) -> None:
    tune = experiment(**PBT).tune
    assert tune is not None
    before = [Member(n, {LR: 0.01}, math.inf if n != 2 else 1.0) for n in range(4)]
    assert {parent for parent, _ in next_generation(tune, before, 1)} == {2}

    played = Player(experiment(**PBT), tmp_path, play=lambda p, e: math.nan).go()
    assert len(played.journal.finished) == 4
    assert played.decisions.reason == "all of a generation failed"


# --- several metrics, constraints ----------------------------------------------------------------


def test_the_front_is_what_none_beats_in_all_metrics(tmp_path: Path) -> None:
    asked = experiment(
        searcher="tpe", trials=20, metric=["val_loss", "latency_ms"], mode=["min", "min"]
    )
    played = Player(
        asked, tmp_path, extras=lambda s: {"latency_ms": float(s.params["model.width"])}
    ).go()
    tune, records = asked.tune, played.journal.finished
    assert tune is not None
    front = results.front(tune, records)
    assert {r.state for r in records} == {"finished"}, "none is stopped early"
    for r in records:
        beaten = [o for o in records if results.dominates(
            results.objectives(tune, o), results.objectives(tune, r))]  # fmt: skip
        assert (r in front) == (not beaten)
    assert len({r.params["model.width"] for r in front}) > 1
    assert results.best(tune, records) == front[0]
    with pytest.raises(KilledError):
        Player(
            asked,
            tmp_path / "killed",
            patience=60,
            extras=lambda s: {"latency_ms": float(s.params["model.width"])},
        ).go()
    again = Player(
        asked,
        tmp_path / "killed",
        extras=lambda s: {"latency_ms": float(s.params["model.width"])},
    ).go()
    assert decided(again.journal) == decided(played.journal)


def test_a_trial_beyond_a_constraint_is_never_the_best_and_the_searcher_learns_it(
    tmp_path: Path,
) -> None:
    asked = experiment(
        searcher="tpe",
        scheduler="none",
        trials=40,
        constraints={"parameters": {"at_most": 20}},
    )
    played = Player(
        asked, tmp_path, extras=lambda s: {"parameters": float(s.params["model.width"])}
    ).go()
    records = played.journal.finished
    beyond = [r for r in records if r.params["model.width"] == 32]
    assert beyond
    assert not any(r.feasible for r in beyond)
    assert beyond[0].reason == "parameters 32 is beyond its constraint"
    best = results.best(asked.tune, records)  # type: ignore[arg-type]
    assert best is not None
    assert best.params["model.width"] == 16
    late = [r.params["model.width"] for r in records[25:]]
    assert late.count(32) < len(late) / 3, "chance would be a third, and the loss prefers 32"


def test_only_whole_trials_within_the_constraints_are_examples_after_a_restart_too(
    tmp_path: Path,
) -> None:
    asked = experiment(searcher="tpe", trials=30, constraints={"parameters": {"at_most": 20}})

    def play(folder: Path) -> Player:
        return Player(
            asked, folder, extras=lambda s: {"parameters": float(s.params["model.width"])}
        )

    played = play(tmp_path).go()
    records = played.journal.finished
    assert {(r.state, r.feasible) for r in records} >= {("finished", False), ("pruned", True)}
    whole = sorted((r.values[-1], r.number) for r in results.complete(records))
    assert len(whole) >= 5
    assert isinstance(played.decisions.rule, Successive)
    assert sorted(played.decisions.rule.finished) == whole
    again = play(tmp_path).decisions.rule
    assert isinstance(again, Successive)
    assert sorted(again.finished) == whole


# --- when it ends --------------------------------------------------------------------------------


def test_a_goal_ends_the_study(tmp_path: Path) -> None:
    asked = experiment(trials=50, scheduler="none", goal=0.5)
    played = Player(asked, tmp_path, slots=2).go()
    best = results.best(asked.tune, played.journal.finished)  # type: ignore[arg-type]
    assert best is not None
    assert best.values[-1] <= 0.5
    assert played.decisions.reason == f"the goal is reached by trial {best.id}"
    assert len(played.journal.finished) < 50
    assert not played.journal.unfinished, "the other was stopped at its next report"


def test_minutes_are_of_all_processes_together_and_the_best_stays(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    asked = experiment(trials=50, scheduler="none", budget={"minutes": 1})
    with pytest.raises(KilledError):
        Player(asked, tmp_path, clock=clock, patience=12).go()
    used = Journal(tmp_path).spent[0]
    assert 0 < used < 60
    played = Player(asked, tmp_path, clock=clock).go()
    assert played.decisions.reason == "the budget is spent"
    assert used < played.journal.spent[0] < 70
    best = results.best(asked.tune, played.journal.finished)  # type: ignore[arg-type]
    assert best is not None
    assert best.state == "finished"


def test_dollars_are_counted_by_the_cluster_as_it_is(tmp_path: Path) -> None:
    now, rate = [0.0], [36.0]

    def clock() -> float:
        now[0] += 1.0  # 0.01 USD at 36 USD an hour
        return now[0]

    asked = experiment(trials=50, scheduler="none", budget={"usd": 0.5, "usd_per_hour": 36})
    dear = Player(asked, tmp_path / "1", clock=clock, usd_per_hour=lambda: rate[0]).go()
    assert dear.decisions.reason == "the budget is spent"
    assert dear.journal.spent[1] == pytest.approx(0.5, abs=0.05)
    rate[0] = 3.6
    cheap = Player(asked, tmp_path / "2", clock=clock, usd_per_hour=lambda: rate[0]).go()
    assert len(cheap.journal.order) > 5 * len(dear.journal.order)


def test_before_any_trial_finished_the_one_that_came_furthest_is_the_best(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    asked = experiment(trials=50, scheduler="none", budget={"minutes": 0.1})
    played = Player(asked, tmp_path, clock=clock).go()
    (only,) = played.journal.finished
    assert only.state == "pruned"
    assert only.reason == "the budget is spent"
    assert results.best(asked.tune, [only]) == only  # type: ignore[arg-type]


def test_prices_are_by_type_or_given_and_unknown_ones_are_told() -> None:
    assert prices.of_nodes([{"instance-type": "m5.large"}] * 2, None) == pytest.approx(0.192)
    spot = {"instance-type": "m5.large", "ray.io/market-type": "spot"}
    assert prices.of_nodes([spot], None) < 0.096
    assert prices.of_nodes([{}, {}], 0.5) == 1.0
    with pytest.raises(ClusterError, match="'m5.larg'.*did you mean 'm5.large'.*usd_per_hour"):
        prices.of_nodes([{"instance-type": "m5.larg"}], None)
    with pytest.raises(ClusterError, match="no label that names its type"):
        prices.of_nodes([{}], None)


def test_a_study_whose_trials_all_fail_is_given_up_with_the_commonest_error(
    tmp_path: Path,
) -> None:
    played = Player(experiment(trials=99), tmp_path, play=lambda p, e: math.nan).go()
    records = played.journal.finished
    assert len(records) == 10
    assert played.decisions.reason == "the first 10 trials failed"
    assert results.best(experiment().tune, records) is None  # type: ignore[arg-type]
    assert results.commonest_error(records) == "10 of 10 failed with:\nval_loss is nan"


def test_one_good_trial_among_failures_keeps_a_study_going(tmp_path: Path) -> None:
    played = Player(
        experiment(trials=30), tmp_path, play=lambda p, e: loss(p, e) if p == OWN else math.inf
    ).go()
    states = [r.state for r in played.journal.finished]
    assert (states.count("failed"), states.count("finished")) == (29, 1)


def test_a_metric_that_is_never_reported_ends_the_study_at_its_first_report(
    tmp_path: Path,
) -> None:
    played = Player(experiment(metric="val_acuracy"), tmp_path)
    with pytest.raises(StudyError, match="'val_acuracy' is never reported, known: val_loss"):
        played.go()


# --- fairness, and earlier studies ---------------------------------------------------------------


def test_the_best_are_trained_again_with_new_seeds_and_the_best_on_average_wins(
    tmp_path: Path,
) -> None:
    def noisy(params: Any, epoch: int) -> float:
        lucky = params == OWN  # with its first seed only
        return 0.01 if lucky else loss(params, epoch)

    asked = experiment(trials=8, scheduler="none", confirm={"top": 3, "seeds": 2})
    played = Player(asked, tmp_path, play=noisy, slots=2).go()
    again = [s for s in played.journal.starts.values() if s.kind == "confirm"]
    assert len(again) == 3 * 2
    assert {s.params["train.seed"] for s in again} == {1, 2}
    confirmed = results.confirmations(asked.tune, played.journal.finished)  # type: ignore[arg-type]
    lucky = next(c for c in confirmed if c.number == 0)
    assert lucky.gap == pytest.approx(loss(OWN, 9) - 0.01)
    best = results.best(asked.tune, played.journal.finished)  # type: ignore[arg-type]
    assert best is not None
    assert best.number != 0
    assert "train.seed" not in best.params


def test_results_that_compare_are_known_and_others_are_tried_first(tmp_path: Path) -> None:
    known = [
        Prior({LR: 10 ** -(1 + n / 10), "model.width": 32}, abs(n - 10) / 10, [], True, "old")
        for n in range(30)
    ]
    asked = experiment(searcher="tpe", scheduler="none", trials=12)
    taught = Player(asked, tmp_path / "1", priors=known).go().journal
    alone = Player(asked, tmp_path / "2").go().journal
    assert taught.starts[0].params == OWN
    near, far = (
        statistics.median(abs(math.log10(s.params[LR]) + 2) for n, s in j.starts.items() if n)
        for j in (taught, alone)
    )
    assert near < far / 2, "it looks near the best of the old ones"

    other = [Prior({LR: 0.02, "model.width": 8, "gone": 1}, 0.5, [], False, "old")]
    tried = Player(asked, tmp_path / "3", priors=other).go().journal
    assert tried.starts[1].params == {LR: 0.02, "model.width": 8}
    assert Journal(tmp_path / "3").priors == other, "a resume does not need the old study"
