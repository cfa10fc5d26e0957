"""A study over Ray Tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from lepton_ray.errors import StudyError
from lepton_ray.tuning import study
from lepton_ray.tuning.journal import Journal, TrialRecord
from tests.ray.conftest import experiment

SPACE = {
    "train.optimizer.lr": {"loguniform": [1e-4, 3e-2]},
    "model.width": {"choice": [4, 8]},
}


def test_a_study_finds_stops_and_resumes(reference: ray.ObjectRef, tmp_path: Path) -> None:
    settings = {"trials": 4, "space": SPACE}
    small = experiment(tune=settings)
    events: list[dict] = []
    with (tmp_path / "said").open("w") as terminal:  # Tune pickles its callbacks; a file cannot be

        def listen(event: dict) -> None:
            events.append(event)
            print(event["kind"], file=terminal)

        best, journal = study.run(small, reference, folder=tmp_path, on_event=listen)
    assert len(journal.finished) == 4
    assert {r.state for r in journal.finished} <= {"finished", "pruned"}
    assert journal.finished[0].params["model.width"] in (4, 8)
    finished = [r for r in journal.finished if r.state == "finished"]
    assert best.values[-1] == min(r.values[-1] for r in finished)
    assert all(len(r.values) == 3 for r in finished)
    first = next(r for r in journal.finished if r.params["train.optimizer.lr"] == 1e-3)
    assert first.params["model.width"] == 4, "the experiment's own values come first"
    assert [e["kind"] for e in events].count("trial_end") == 4

    more = experiment(tune={**settings, "trials": 6})
    _, extended = study.run(more, reference, folder=tmp_path)
    assert [r.id for r in extended.finished[:4]] == [r.id for r in journal.finished]
    assert len(extended.finished) == 6


def test_a_killed_study_does_what_is_left_and_first_what_was_cut_off(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    done = {"train.optimizer.lr": 0.001, "model.width": 4}
    cut_off = {"train.optimizer.lr": 0.02, "model.width": 8}
    killed = Journal(tmp_path)
    killed.start("done", done)
    killed.finish(TrialRecord(id="done", params=done, state="finished", values=[9.0, 9.0, 9.0]))
    killed.start("cut-off", cut_off)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"star')
    events: list[dict] = []
    best, _ = study.run(
        # One at a time: of two actors, either may be the first to start.
        experiment(tune={"trials": 3, "parallel": 1, "scheduler": "none", "space": SPACE}),
        reference,
        folder=tmp_path,
        on_event=events.append,
    )
    started = [e["params"] for e in events if e["kind"] == "trial_start"]
    assert len(started) == 2
    assert started[0] == cut_off
    assert done not in started
    journal = Journal(tmp_path)
    assert [r.state for r in journal.finished] == ["finished"] * 3
    assert best.values[-1] < 9.0
    assert len(best.values) == 3


def test_a_bad_trial_does_not_end_the_study(reference: ray.ObjectRef, tmp_path: Path) -> None:
    settings = {
        "trials": 4,
        "searcher": "random",
        "scheduler": "none",
        "space": {"model.name": {"choice": ["tests.nets:explode", "mlp"]}},
    }
    best, journal = study.run(
        experiment(model={"name": "mlp"}, tune=settings), reference, folder=tmp_path
    )
    assert best.params == {"model.name": "mlp"}
    failed = [r for r in journal.finished if r.state == "failed"]
    assert failed
    assert all("this model cannot be trained" in r.error for r in failed)
    assert len(Journal(tmp_path).finished) == 4


def test_no_finished_trial_is_an_error_with_the_reason(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    settings = {"trials": 2, "space": {"train.batch": {"choice": [32, 64]}}}
    broken = experiment(model={"name": "tests.nets:explode"}, tune=settings)
    with pytest.raises(StudyError, match="none of 2 trials finished(.|\n)*cannot be trained"):
        study.run(broken, reference, folder=tmp_path)
