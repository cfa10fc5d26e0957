"""The journal of a study, what Optuna is told, and what a space may name. No cluster."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lepton_ray.config.schema import Distribution, Experiment
from lepton_ray.errors import ExperimentError
from lepton_ray.tuning import space
from lepton_ray.tuning.journal import Journal, Report, TrialStart
from lepton_ray.tuning.searcher import OptunaSearcher
from tests.studies import LR, OWN, SPACE, experiment, record


def searcher(journal: Journal, *, of: Experiment | None = None) -> OptunaSearcher:
    asked = of or experiment()
    assert asked.tune is not None
    return OptunaSearcher(asked.tune, journal, space.settings(asked), space.own_values(asked))


def told(search: OptunaSearcher, state: TrialState) -> list[optuna.trial.FrozenTrial]:
    return search.study.get_trials(states=[state])


# --- the journal ---------------------------------------------------------------------------------


def test_a_journal_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    first = Journal(tmp_path / "study")
    first.open({"space": {}})
    first.start(TrialStart(number=0, params=OWN))
    first.start(TrialStart(number=1, params={LR: 0.01}, kind="member", parent=0))
    first.report(0, Report(1, 0.5, ""), (1.0, 0.1))
    first.report(0, Report(2, math.nan, "val_loss is nan"), (2.0, 0.2))
    first.finish(record(0, state="failed", values=[math.nan], error="line 1\nline 2 \u2028 é"))
    again = Journal(tmp_path / "study")
    assert again.header == {"space": {}}
    assert again.reports[0][0] == Report(1, 0.5, "")
    assert math.isnan(again.reports[0][1].value)
    assert again.reports[0][1].stop == "val_loss is nan"
    assert again.finished[0].error == "line 1\nline 2 \u2028 é"
    assert list(again.unfinished) == [1]
    assert again.unfinished[1].parent == 0


def test_what_was_spent_adds_up_over_processes(tmp_path: Path) -> None:
    for _ in range(3):
        journal = Journal(tmp_path)
        journal.open({"space": {}})
        number = len(journal.starts)
        journal.start(TrialStart(number=number, params=OWN))
        journal.report(number, Report(1, 0.5, ""), (4.0, 0.1))
        journal.report(number, Report(2, 0.5, ""), (10.0, 0.5))
    assert Journal(tmp_path).spent == (30.0, 1.5)


@pytest.mark.parametrize("written", ['{"sta', '{"started": "x", "params": {"train', "{"])
def test_a_half_written_last_line_costs_that_line_only(tmp_path: Path, written: str) -> None:
    first = Journal(tmp_path)
    first.start(TrialStart(number=0, params=OWN))
    first.finish(record(0))
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(written)
    second = Journal(tmp_path)
    assert [r.number for r in second.finished] == [0]
    assert second.unfinished == {}
    second.start(TrialStart(number=1, params=OWN))
    third = Journal(tmp_path)
    assert list(third.unfinished) == [1], "the line after the broken one is read"
    assert [r.number for r in third.finished] == [0]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    line = {"started": {"number": 0, "params": OWN}}
    (tmp_path / "trials.jsonl").write_text(json.dumps(line))
    Journal(tmp_path).start(TrialStart(number=1, params=OWN))
    assert list(Journal(tmp_path).unfinished) == [0, 1]


# --- the searcher --------------------------------------------------------------------------------


def test_a_finished_trial_is_complete_with_its_values(tmp_path: Path) -> None:
    search = searcher(Journal(tmp_path))
    search.propose(0)
    for epoch, value in ((1, 0.9), (2, 0.4)):
        search.report(0, Report(epoch, value, ""))
    search.tell(record(0, values=[0.9, 0.4]))
    (trial,) = told(search, TrialState.COMPLETE)
    assert (trial.value, trial.intermediate_values) == (0.4, {1: 0.9, 2: 0.4})


def test_an_early_stopped_trial_is_pruned_and_not_complete(tmp_path: Path) -> None:
    search = searcher(Journal(tmp_path))
    search.propose(0)
    search.report(0, Report(1, 0.9, "2 of 2 at epoch 1"))
    search.tell(record(0, state="pruned", values=[0.9]))
    (trial,) = told(search, TrialState.PRUNED)
    assert trial.intermediate_values == {1: 0.9}
    assert told(search, TrialState.COMPLETE) == []


def test_a_trial_without_a_number_or_a_process_has_failed(tmp_path: Path) -> None:
    search = searcher(Journal(tmp_path))
    search.propose(0)
    search.report(0, Report(1, math.nan, "val_loss is nan"))
    search.tell(record(0, state="failed", values=[math.nan]))
    assert len(told(search, TrialState.FAIL)) == 1
    search.propose(1)  # a failure does not end the search


@pytest.mark.parametrize("kind", ["tpe", "multivariate_tpe", "random", "gp", "cmaes"])
def test_a_study_of_the_same_seed_asks_for_the_same_trials(tmp_path: Path, kind: str) -> None:
    numeric = {LR: SPACE[LR], "train.clip": {"uniform": [0.1, 5.0]}}

    def ask(folder: Path, seed: int) -> list[dict[str, Any]]:
        asked = experiment(searcher=kind, seed=seed, trials=9, space=numeric)
        search = searcher(Journal(folder), of=asked)
        found = []
        for number in range(8):
            found.append(search.propose(number).params)
            search.tell(record(number, params=found[-1], values=[found[-1][LR]]))
        return found

    assert ask(tmp_path / "1", 0) == ask(tmp_path / "2", 0) != ask(tmp_path / "3", 1)


def test_the_mode_follows_from_the_metrics_name_and_reaches_optuna(tmp_path: Path) -> None:
    asked = experiment(metric="val_accuracy")
    assert asked.tune is not None
    assert asked.tune.modes == ("max",)
    search = searcher(Journal(tmp_path), of=asked)
    for number, value in enumerate((0.2, 0.9)):
        search.propose(number)
        search.tell(record(number, values=[value]))
    assert search.study.best_value == 0.9


# --- the space -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "inside"),
    [
        ({"uniform": [0.1, 0.3]}, lambda v: 0.1 <= v <= 0.3),
        ({"loguniform": [1e-5, 1e-1]}, lambda v: 1e-5 <= v <= 1e-1),
        ({"quniform": [0.0, 0.4, 0.1]}, lambda v: round(v, 6) in (0.0, 0.1, 0.2, 0.3, 0.4)),
        ({"randint": [2, 4]}, lambda v: v in (2, 3, 4) and isinstance(v, int)),
        ({"choice": ["adam", "sgd"]}, lambda v: v in ("adam", "sgd")),
    ],
)
def test_every_distribution_gives_values_inside_it(
    tmp_path: Path, where: dict, inside: Any
) -> None:
    search = searcher(Journal(tmp_path), of=experiment(space={"model.anything": where}))
    values = {search.propose(n).params["model.anything"] for n in range(30)}
    assert all(map(inside, values)), values
    assert len(values) > 1


def test_own_values_are_those_of_the_file_the_schema_and_the_model() -> None:
    asked = experiment(
        space={
            LR: {"loguniform": [1e-4, 1e-1]},
            "train.shards": {"choice": [2, 4]},  # not in the file: follows from the batch
            "model.dropout": {"uniform": [0.0, 0.5]},  # not in the file: the model's default
            "model.width": {"choice": [4, 8]},  # 16 in the file, which is outside
            "train.clip": {"uniform": [0.1, 1.0]},  # none by default
        }
    )
    assert space.own_values(asked) == {LR: 0.003, "train.shards": 4, "model.dropout": 0.1}


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        (
            {"train.optimiser.lr": {"uniform": [0.1, 1.0]}},
            "tune.space: 'train.optimiser.lr' names no setting, did you mean 'train.optimizer.lr'?",
        ),
        (
            {"model.widht": {"choice": [8]}},
            "tune.space: 'model.widht' names no setting, did you mean 'model.width'?",
        ),
        ({"train.batch": {"choice": [32, 33]}}, "tune.space.train.batch: 33: .*multiple of shards"),
        ({"train.batch": {"randint": [0, 64]}}, "tune.space.train.batch: 0: .*greater than or"),
        ({"train.ema": {"uniform": [0.5, 1.0]}}, "tune.space.train.ema: 1.0: .*less than 1"),
        ({"train.precision": {"choice": ["fp32", "fp8"]}}, "train.precision: 'fp8'"),
    ],
)
def test_a_space_is_refused_before_anything_runs(searched: dict, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        space.check(experiment(space=searched))


def test_all_problems_of_a_space_are_told_at_once() -> None:
    searched = {"train.batch": {"choice": [33, 35]}, "train.epocs": {"randint": [1, 2]}}
    with pytest.raises(ExperimentError) as caught:
        space.check(experiment(space=searched))
    assert len(caught.value.problems) == 3


def test_a_space_over_settings_that_exist_is_accepted() -> None:
    space.check(experiment(space={**SPACE, "train.optimizer.weight_decay": {"uniform": [0, 0.1]}}))


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        (
            {LR: {"uniform": [0.1, 1], "when": {"model.nam": "cnn"}}},
            f"tune.space.{LR}.when: 'model.nam' names no setting, did you mean 'model.name'?",
        ),
        (
            {LR: {"uniform": [0.1, 1], "when": {"model.name": "mlp"}}},
            f"tune.space.{LR}.when: model.name can never be 'mlp', it is 'cnn'",
        ),
        (
            {
                "model.width": {"choice": [4, 8]},
                LR: {"uniform": [0.1, 1], "when": {"model.width": [16, 32]}},
            },
            f"tune.space.{LR}.when: model.width can never be 16 or 32, it is searched over",
        ),
        (
            {
                "model.width": {"choice": [4, 8], "when": {LR: 0.5}},
                LR: {"uniform": [0.1, 1], "when": {"model.width": 4}},
            },
            "the conditions of model.width, train.optimizer.lr wait for each other",
        ),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(searched: dict, said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        space.check(experiment(space=searched))
    assert said in str(caught.value)


def test_a_condition_on_the_model_says_whose_settings_are_meant() -> None:
    searched = {
        "model.name": {"choice": ["cnn", "mlp"]},
        "model.width": {"randint": [4, 8], "when": {"model.name": "cnn"}},
        "model.depth": {"randint": [1, 3], "when": {"model.name": "mlp"}},
    }
    asked = experiment(space=searched)
    space.check(asked)
    searched["model.depth"]["when"] = {"model.name": "cnn"}
    with pytest.raises(ExperimentError, match="'model.depth' names no setting"):
        space.check(experiment(space=searched))


def test_sections_of_a_space_may_be_nested() -> None:
    nested = {"train": {"optimizer": {"lr": {"loguniform": [1e-4, 1e-1]}}, "clip": {"choice": [1]}}}
    asked = experiment(space=nested)
    assert asked.tune is not None
    assert list(asked.tune.space) == [LR, "train.clip"]


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        (
            {"searcher": "tpo"},
            "tune.searcher: input should be 'tpe', 'multivariate_tpe', 'random', 'grid'",
        ),
        ({"scheduler": "ahsa"}, "tune.scheduler: input should be 'asha', 'hyperband'"),
        ({"metric": ["val_loss", "seconds"], "scheduler": "asha"}, "ranks trials by one metric"),
        ({"metric": ["val_loss", "seconds"], "searcher": "cmaes"}, "takes one metric, but got 2"),
        ({"metric": ["val_loss"], "mode": ["min", "max"]}, "mode must have one entry for each"),
        ({"searcher": "pbt", "scheduler": "asha"}, "leave scheduler out"),
        ({"searcher": "pbt", "confirm": {}}, "leave confirm out"),
        ({"constraints": {"parameters": {}}}, "a constraint needs at_most or at_least"),
        ({"budget": {}}, "a budget needs minutes or usd"),
    ],
)
def test_what_does_not_fit_together_is_refused(tune: dict, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        experiment(**tune)


@pytest.mark.parametrize(
    ("where", "inside", "outside"),
    [
        ({"quniform": [0.0, 0.5, 0.1]}, [0.0, 0.3, 0.5], [0.123, 0.6]),
        ({"randint": [1, 9]}, [1, 4.0, 9], [4.5, 10]),
        ({"uniform": [0.0, 0.5]}, [0.123], [0.6, "a"]),
        ({"choice": ["a", 1]}, ["a", 1], ["b", 0.5]),
    ],
)
def test_what_a_distribution_contains_is_what_it_draws(
    where: dict, inside: list, outside: list
) -> None:
    """An earlier study's values are told to the searcher if they lie in this one's space."""
    of = Distribution(**where)
    assert [space.contains(of, value) for value in inside] == [True] * len(inside)
    assert [space.contains(of, value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"searcher": "grid"}, "searcher grid tries all values, but these have no end"),
        ({"searcher": "pbt"}, "only train.optimizer.* and train.clip can"),
        (
            {
                "searcher": "pbt",
                "space": {"train.optimizer.name": {"choice": ["adamw", "sgd"]}},
            },
            "its optimizer stays",
        ),
    ],
)
def test_a_searcher_refuses_a_space_it_cannot_search(tune: dict, said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        space.check(experiment(**tune))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"metric": "val_acuracy"}, "tune.metric: 'val_acuracy' is never reported, did you mean"),
        ({"metric": "latency_ms"}, "tune.metric: 'latency_ms' is measured once"),
        ({"constraints": {"latency": {"at_most": 1}}}, "tune.constraints: 'latency' is never"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_by_the_plan(tune: dict, said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        space.check_metrics(experiment(**tune), ["train_loss", "val_loss", "val_accuracy"])


def test_two_spaces_differ_line_by_line() -> None:
    ours, theirs = (
        experiment(space=s).tune.space  # type: ignore[union-attr]
        for s in (
            {LR: {"uniform": [0.1, 1]}, "train.clip": {"choice": [1]}},
            {LR: {"uniform": [0.1, 2]}, "model.width": {"choice": [1]}},
        )
    )
    assert space.differences(ours, ours) == []
    assert space.differences(ours, theirs) == [
        "model.width was searched, and is not now",
        "train.clip is new",
        f"{LR} is {{'uniform': (0.1, 1.0)}} now and was {{'uniform': (0.1, 2.0)}}",
    ]
