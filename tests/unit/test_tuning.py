"""The journal of a study, what the searcher tells Optuna, and what a space may name. No cluster."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import ExperimentError
from lepton_ray.tuning import space
from lepton_ray.tuning.journal import Journal, TrialRecord
from lepton_ray.tuning.searcher import OptunaSearcher

LR = "train.optimizer.lr"
SPACE = {LR: {"loguniform": [1e-4, 1e-1]}, "model.width": {"choice": [8, 16, 32]}}
OWN = {LR: 0.003, "model.width": 16}


def experiment(**tune: Any) -> Experiment:
    return validate(
        {
            "name": "tuning",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "cnn", "width": 16},
            "train": {"optimizer": {"lr": 0.003}},
            "tune": {"searcher": "random", "space": SPACE, **tune},
        }
    )


def searcher(journal: Journal, *, of: Experiment | None = None) -> OptunaSearcher:
    asked = of or experiment()
    assert asked.tune is not None
    return OptunaSearcher(
        asked.tune, space.distributions(asked.tune.space), journal, space.own_values(asked)
    )


def epoch(number: int, value: float, **rest: Any) -> dict[str, Any]:
    return {"training_iteration": number, "val_loss": value, **rest}


def record(id: str, **values: Any) -> TrialRecord:
    return TrialRecord(**{"id": id, "params": OWN, "state": "finished", "values": [1.0], **values})


def told(search: OptunaSearcher, state: TrialState) -> list:
    return search._study.get_trials(states=[state])


# --- the journal ---------------------------------------------------------------------------------


def test_a_journal_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    first = Journal(tmp_path / "study")
    first.start("a", OWN)
    first.start("b", {LR: 0.01, "model.width": 8})
    first.finish(record("a", values=[0.5, 0.25], metrics={"val_loss": 0.25}, seconds=1.5))
    first.start("c", OWN)
    first.finish(record("c", state="failed", values=[math.nan], error="line 1\nline 2 \u2028 é"))
    again = Journal(tmp_path / "study")
    assert again.finished[0] == first.finished[0]
    assert math.isnan(again.finished[1].values[0])
    assert again.finished[1].error == "line 1\nline 2 \u2028 é"
    assert again.unfinished == {"b": {LR: 0.01, "model.width": 8}}


@pytest.mark.parametrize("written", ['{"sta', '{"started": "x", "params": {"train', "{"])
def test_a_half_written_last_line_costs_that_line_only(tmp_path: Path, written: str) -> None:
    first = Journal(tmp_path)
    first.start("a", OWN)
    first.finish(record("a"))
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(written)
    second = Journal(tmp_path)
    assert [r.id for r in second.finished] == ["a"]
    assert second.unfinished == {}
    second.start("b", OWN)
    third = Journal(tmp_path)
    assert list(third.unfinished) == ["b"], "the line after the broken one is read"
    assert [r.id for r in third.finished] == ["a"]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(json.dumps({"started": "a", "params": OWN}))
    Journal(tmp_path).start("b", OWN)
    assert list(Journal(tmp_path).unfinished) == ["a", "b"]


@pytest.mark.parametrize(("mode", "expected"), [("min", "b"), ("max", "c")])
def test_the_best_is_a_finished_trial_by_its_last_value(
    tmp_path: Path, mode: str, expected: str
) -> None:
    journal = Journal(tmp_path)
    assert journal.best(mode) is None
    for r in (
        record("p", state="pruned", values=[0.0]),
        record("f", state="failed", values=[9.0]),
        record("b", values=[5.0, 0.2]),
        record("c", values=[0.1, 0.7]),
    ):
        journal.finish(r)
    best = journal.best(mode)
    assert best is not None
    assert best.id == expected


# --- the searcher --------------------------------------------------------------------------------


def test_the_first_trial_has_the_experiments_own_values(tmp_path: Path) -> None:
    search = searcher(Journal(tmp_path))
    assert search.suggest("a") == OWN
    assert search.suggest("b") != OWN


def test_a_finished_trial_is_complete_with_its_values(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    search = searcher(journal)
    search.suggest("a")
    search.on_trial_result("a", epoch(1, 0.9))
    search.on_trial_complete("a", epoch(2, 0.4, finished=True, train_loss=0.3, time_total_s=2.0))
    (trial,) = told(search, TrialState.COMPLETE)
    assert (trial.value, trial.intermediate_values) == (0.4, {1: 0.9, 2: 0.4})
    (kept,) = journal.finished
    assert (kept.state, kept.values, kept.seconds) == ("finished", [0.9, 0.4], 2.0)
    assert kept.metrics == {"val_loss": 0.4, "train_loss": 0.3}


def test_an_early_stopped_trial_is_pruned_and_not_complete(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    search = searcher(journal)
    search.suggest("a")
    search.on_trial_result("a", epoch(1, 0.9))
    search.on_trial_complete("a", epoch(1, 0.9, finished=False))
    (trial,) = told(search, TrialState.PRUNED)
    assert trial.intermediate_values == {1: 0.9}, "and the same epoch is not counted twice"
    assert told(search, TrialState.COMPLETE) == []
    assert journal.finished[0].state == "pruned"


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (epoch(1, math.nan, error="ValueError: boom", done=True), False, "ValueError: boom"),
        (epoch(1, math.inf, finished=True), False, ""),
        (None, True, "the trial's process died"),
        (epoch(1, 0.5, finished=True), True, "the trial's process died"),
        ({}, False, ""),
    ],
)
def test_a_trial_without_a_number_or_a_process_has_failed(
    tmp_path: Path, result: dict[str, Any] | None, error: bool, said: str
) -> None:
    journal = Journal(tmp_path)
    search = searcher(journal)
    search.suggest("a")
    search.on_trial_complete("a", result, error=error)
    assert len(told(search, TrialState.FAIL)) == 1
    assert journal.finished[0].state == "failed"
    assert journal.finished[0].error == said
    assert journal.best("min") is None
    search.suggest("b")  # a failure does not end the search


def test_a_new_searcher_knows_the_old_trials_and_tries_the_cut_off_ones_first(
    tmp_path: Path,
) -> None:
    search = searcher(Journal(tmp_path))
    for name in "abcd":
        search.suggest(name)
    search.on_trial_complete("a", epoch(1, 0.4, finished=True))
    search.on_trial_result("b", epoch(1, 0.8))
    search.on_trial_complete("b", epoch(1, 0.8))
    search.on_trial_complete("c", epoch(1, math.nan, error="boom"))
    cut_off = dict(search._running["d"].params)

    again = searcher(Journal(tmp_path))
    (complete,) = told(again, TrialState.COMPLETE)
    assert (complete.value, complete.params) == (0.4, OWN)
    (pruned,) = told(again, TrialState.PRUNED)
    assert pruned.intermediate_values == {1: 0.8}
    assert len(told(again, TrialState.FAIL)) == 1
    assert again.suggest("e") == cut_off
    assert again.suggest("f") not in (cut_off, OWN)


def test_a_trial_that_was_cut_off_is_tried_again_once_and_not_at_every_resume(
    tmp_path: Path,
) -> None:
    searcher(Journal(tmp_path)).suggest("a")
    second = searcher(Journal(tmp_path))
    assert second.suggest("b") == OWN
    second.on_trial_complete("b", epoch(1, 0.4, finished=True))
    third = searcher(Journal(tmp_path))
    assert third.suggest("c") != OWN, "its second try has finished"


def test_a_trial_that_was_cut_off_twice_is_tried_once_more(tmp_path: Path) -> None:
    searcher(Journal(tmp_path)).suggest("a")
    searcher(Journal(tmp_path)).suggest("b")
    third = searcher(Journal(tmp_path))
    assert third.suggest("c") == OWN
    assert third.suggest("d") != OWN


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_study_of_the_same_seed_asks_for_the_same_trials(tmp_path: Path, kind: str) -> None:
    def ask(folder: Path, seed: int) -> list[dict[str, Any]]:
        search = searcher(Journal(folder), of=experiment(searcher=kind, seed=seed, trials=9))
        asked = []
        for n in range(8):
            asked.append(search.suggest(str(n)))
            search.on_trial_complete(str(n), epoch(1, asked[-1][LR], finished=True))
        return asked

    assert ask(tmp_path / "1", 0) == ask(tmp_path / "2", 0) != ask(tmp_path / "3", 1)


def test_the_mode_reaches_optuna(tmp_path: Path) -> None:
    search = searcher(Journal(tmp_path), of=experiment(metric="val_accuracy", mode="max"))
    for name, value in (("a", 0.2), ("b", 0.9)):
        search.suggest(name)
        search.on_trial_complete(
            name, {"training_iteration": 1, "val_accuracy": value, "finished": True}
        )
    assert search._study.best_value == 0.9


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
    values = {search.suggest(str(n))["model.anything"] for n in range(30)}
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
