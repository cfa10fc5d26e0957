"""A study over Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lepton_ray.config import with_settings
from lepton_ray.data import Dataset
from lepton_ray.errors import StudyError
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.tuning import report, results, study
from lepton_ray.tuning.decisions import header
from lepton_ray.tuning.journal import Journal, TrialStart
from tests.lab import wait_for
from tests.ray.conftest import experiment
from tests.studies import decided

LR = "train.optimizer.lr"
SPACE = {LR: {"loguniform": [1e-4, 3e-2]}, "model.width": {"choice": [4, 8]}}


def direct(settings: dict[str, Any], dataset: Dataset, epochs: int = 3) -> Replica:
    """The same training without Ray."""
    replica = Replica(with_settings(experiment(), settings), dataset, epochs=epochs)
    for _ in replica.epochs():
        pass
    return replica


def test_a_study_finds_stops_reports_and_is_extended(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    small = experiment(tune={"trials": 5, "space": SPACE, "keep": 1})
    events: list[dict] = []
    with (tmp_path / "said").open("w") as terminal:  # Tune pickles what it gets; a file cannot be

        def listen(event: dict) -> None:
            events.append(event)
            print(event["kind"], file=terminal)

        found = study.run(small, reference, folder=tmp_path, on_event=listen)
    records = found.journal.finished
    assert len(records) == 5
    assert {r.state for r in records} <= {"finished", "pruned"}
    finished = [r for r in records if r.state == "finished"]
    assert found.best.values[-1] == min(r.values[-1] for r in finished)
    assert all(len(r.values) == 3 for r in finished)
    assert found.journal.starts[0].params == {LR: 1e-3, "model.width": 4}, "its own come first"
    assert [e["kind"] for e in events].count("trial_end") == 5
    told = [(e["trial"], e["epoch"]) for e in events if e["kind"] == "trial_result"]
    assert len(told) == len(set(told)) == sum(len(r.values) for r in records)

    # The best trial again, by itself: the same bytes.
    same = direct(found.best.params, dataset)
    assert state_sha256(same.state.final_weights()) == found.best.weights_sha256
    assert found.best.metrics["val_loss"] == same.state.history[-1]["val_loss"]
    kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert kept == [found.best.id], "checkpoints of the best, and no others"

    page, *pictures = report.write(small, found.journal, tmp_path / "report")
    text = page.read_text()
    assert "src=" not in text.split("</script>")[-1], "needs nothing beside it"
    assert text.count('class="plotly-graph-div"') >= 4
    assert f"trial {found.best.id}" in text
    assert {"history.png", "curves.png"} <= {p.name for p in pictures}

    more = study.run(small, reference, folder=tmp_path, more=2)
    assert [r.number for r in more.journal.finished[:5]] == [r.number for r in records]
    assert len(more.journal.finished) == 7


def test_a_killed_study_goes_on_as_if_it_had_not_been(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    asked = experiment(tune={"trials": 4, "parallel": 1, "searcher": "tpe", "space": SPACE})
    whole = study.run(asked, reference, folder=tmp_path / "whole").journal
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines()
    for cut in (4, 8):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "trials.jsonl").write_text("\n".join(lines[:cut]) + '\n{"star')
        again = study.run(asked, reference, folder=folder).journal
        assert decided(again) == decided(whole)
        ends = [{r.number: r.weights_sha256 for r in j.finished} for j in (again, whole)]
        assert ends[0] == ends[1]


def test_a_cut_off_trial_goes_on_from_its_own_checkpoint(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    tune = {"trials": 1, "scheduler": "none", "space": SPACE}
    asked = experiment(tune=tune, train={"epochs": 3, "batch": 64, "digest_every": 5})
    params = {LR: 0.02, "model.width": 8}
    journal = Journal(tmp_path)
    journal.open(header(asked))
    journal.start(TrialStart(number=0, params=params))
    begun = Replica(
        with_settings(asked, params),
        dataset,
        checkpoints=CheckpointFolder(str(tmp_path / "checkpoints" / "0000")),
        epochs=2,
    )
    for _ in begun.epochs():
        pass
    found = study.run(asked, reference, folder=tmp_path)
    (record,) = found.journal.finished
    whole = direct(params, dataset)
    assert record.weights_sha256 == state_sha256(whole.state.final_weights())
    assert record.values == [m["val_loss"] for m in whole.state.history]
    # All that was said at the end is of the one call in which it trained.
    assert record.metrics["seconds"] > 0


def test_workers_of_a_trial_change_nothing_but_its_speed_nor_does_the_death_of_one(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    tune = {"trials": 2, "scheduler": "none", "space": SPACE}
    died = tmp_path / "died"
    model = {"name": "tests.nets:mortal", "inner": "cnn", "width": 4, "once": str(died)}
    one, two = (
        study.run(
            experiment(model=model, tune={**tune, "workers": n, "parallel": 3 - n}),
            reference,
            folder=tmp_path / str(n),
        ).journal
        for n in (1, 2)
    )
    assert {r.number: r.weights_sha256 for r in one.finished} == {
        r.number: r.weights_sha256 for r in two.finished
    }
    assert all(r.weights_sha256 for r in one.finished)
    assert died.exists()


def test_a_population_ends_with_weights_that_went_through_several_settings(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    asked = experiment(
        tune={
            "searcher": "pbt",
            "population": {"size": 2, "every": 1},
            "space": {LR: {"loguniform": [1e-3, 3e-2]}},
        }
    )
    found = study.run(asked, reference, folder=tmp_path)
    journal = found.journal
    assert [len(journal.reports[n]) for n in sorted(journal.starts)] == [1] * 6
    assert [journal.reports[n][0].epoch for n in sorted(journal.starts)] == [1, 1, 2, 2, 3, 3]
    assert found.best.number in (4, 5)
    parent = journal.starts[found.best.number].parent
    assert parent in (2, 3)
    loaded = CheckpointFolder(found.checkpoint).load_last()
    assert loaded is not None
    assert [h["val_loss"] for h in loaded[1]["history"]][-2:] == [
        journal.ended[parent].values[-1],
        found.best.values[-1],
    ]


class LateTrial(study.Trial):
    """A process that trial 1 starts is not ready before a file is there."""

    awaited = ""

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        environment = ray.get_runtime_context().runtime_env
        Path(f"{self.awaited}.{config['trial']}").write_text(repr(environment))
        if config["trial"] == 1:
            wait_for(lambda: Path(self.awaited).exists(), 60)
        super().setup(config, **parameters)


def test_a_process_that_starts_slowly_is_waited_for_and_not_thrown_away(
    reference: ray.ObjectRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited = tmp_path / "trial 2 ended"
    late = type("LateTrial", (LateTrial,), {"awaited": str(awaited)})
    monkeypatch.setattr(study, "Trial", late)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "trial_end" and event["trial"] == "0002":
            awaited.touch()

    def processes() -> set[str]:
        return set(ray._private.state.actors())

    before = processes()
    asked = experiment(tune={"trials": 6, "space": SPACE, "scheduler": "none", "parallel": 2})
    found = study.run(asked, reference, folder=tmp_path / "study", on_event=listen)
    assert {r.state for r in found.journal.finished} == {"finished"}
    assert len(processes() - before) == 2
    environments = {path.read_text() for path in tmp_path.glob("trial 2 ended.*")}
    assert environments == {"{}"}, "any process of the cluster will do, and no key is given away"


def test_a_bad_trial_does_not_end_the_study_and_says_what_it_printed(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    tune = {
        "searcher": "grid",
        "scheduler": "none",
        "space": {"model.name": {"choice": ["tests.nets:explode", "mlp"]}},
    }
    found = study.run(experiment(model={"name": "mlp"}, tune=tune), reference, folder=tmp_path)
    assert found.best.params == {"model.name": "mlp"}
    (failed,) = [r for r in found.journal.finished if r.state == "failed"]
    assert "this model cannot be trained" in failed.error
    assert "last lines of the trial's output:\nabout to explode" in failed.error


def test_no_finished_trial_is_an_error_with_the_commonest_reason(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    tune = {"trials": 2, "space": {"train.batch": {"choice": [32, 64]}}}
    broken = experiment(model={"name": "tests.nets:explode"}, tune=tune)
    with pytest.raises(StudyError, match="none of 2 trials finished; 2 of 2 .*(.|\n)*be trained"):
        study.run(broken, reference, folder=tmp_path)


def parameters_halved(model: torch.nn.Module, dataset: Dataset) -> float:
    return sum(p.numel() for p in model.parameters()) / 2


def test_what_is_measured_of_the_model_counts_and_a_constraint_saves_the_training(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    asked = experiment(
        tune={
            "searcher": "grid",
            "metric": ["val_loss", "latency_ms"],
            "constraints": {"parameters": {"at_most": 1500}},
            "space": {"model.width": {"choice": [2, 4, 64]}},
        }
    )
    found = study.run(asked, reference, folder=tmp_path, measures={"latency_ms": parameters_halved})
    small, middle, large = (found.journal.ended[n] for n in range(3))
    assert not large.feasible
    assert large.values == [], "it was refused before its first epoch"
    assert middle.metrics["latency_ms"] == middle.metrics["parameters"] / 2
    assert asked.tune is not None
    assert {r.number for r in results.front(asked.tune, found.journal.finished)} <= {0, 1}
    assert small.feasible


def test_a_budget_stops_trials_at_once_and_keeps_the_best(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    asked = experiment(
        model={"name": "tests.nets:sleepy", "inner": "cnn", "pause_s": 0.02, "width": 4},
        train={"epochs": 4000, "batch": 64},
        tune={
            "trials": 50,
            "scheduler": "none",
            "budget": {"usd": 5},
            "space": {LR: {"loguniform": [1e-4, 3e-2]}},
        },
    )
    rate = [0.0]

    def listen(event: dict) -> None:
        if event["kind"] == "trial_result":
            rate[0] = 1e6  # a very large cluster has come

    found = study.run(
        asked, reference, folder=tmp_path, usd_per_hour=lambda: rate[0], on_event=listen
    )
    assert found.reason == "the budget is spent"
    assert found.best.state == "pruned"
    assert found.best.reason == "the budget is spent"
    assert not found.journal.unfinished
    assert found.journal.closed == "the budget is spent"
    assert found.journal.spent[1] > 5
