"""What a study leaves in MLflow, also when its driver was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from lepton_ray.config import validate
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.jobs.watchers import StudyWatcher, TrainingWatcher
from lepton_ray.tracking import store
from lepton_ray.tracking.store import Tracker
from lepton_ray.tuning.journal import Journal, TrialRecord

PARAMS = {"model.width": 8}


class Lines:
    def __init__(self) -> None:
        self.progressed: list[str] = []

    def say(self, text: str) -> None:
        pass

    def progress(self, text: str) -> None:
        self.progressed.append(text)


def started(trial: str) -> dict:
    return {"kind": "trial_start", "trial": trial, "params": PARAMS}


def ended(trial: str, state: str, **rest: object) -> dict:
    value = {"id": trial, "params": PARAMS, "state": state, "values": [0.5], **rest}
    return {"kind": "trial_end", "trial": trial, "record": TrialRecord(**value)}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    experiment = validate(
        {
            "name": "watched",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "mlp"},
            "tune": {"trials": 4, "space": {"model.width": {"choice": [8, 16]}}},
            "storage": str(tmp_path / "results"),
        }
    )
    folder = RunFolder.create(experiment, "tune")

    def watcher() -> tuple[StudyWatcher, Tracker, Lines]:
        tracker, lines = Tracker("watched", tmp_path / "artifacts"), Lines()
        again = RunFolder.open(folder.uri)
        return StudyWatcher(experiment, tracker, again, lines, {}), tracker, lines

    return watcher, folder


def children(tracker: Tracker, parent: str) -> dict[str, str]:
    found = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    return {run.info.run_name: run.info.status for run in found}


def test_a_resumed_study_goes_on_in_the_same_run_and_ends_what_was_cut_off(make) -> None:
    watcher, folder = make
    first, tracker, _ = watcher()
    journal = Journal(folder.path / "study")
    for event in (started("a"), started("b"), ended("a", "finished")):
        first(event)
    journal.finish(ended("a", "finished")["record"])
    assert children(tracker, first.run_id) == {"trial a": "FINISHED", "trial b": "RUNNING"}

    second, tracker, lines = watcher()  # the first one's process was killed
    assert second.run_id == first.run_id
    assert tracker.client.get_run(second.run_id).info.status == "RUNNING"
    assert children(tracker, second.run_id) == {"trial a": "FINISHED", "trial b": "KILLED"}
    second(started("c"))
    assert lines.progressed == ["tune   1 of 4 trials done, 1 running, best val_loss 0.5000"]
    assert children(tracker, second.run_id)["trial c"] == "RUNNING"


def test_a_failed_trial_keeps_its_error_and_a_stopped_study_leaves_none_running(make) -> None:
    watcher, _ = make
    study, tracker, _ = watcher()
    for event in (
        started("bad"),
        {"kind": "trial_result", "trial": "bad", "epoch": 1, "metrics": {"val_loss": 0.7}},
        ended("bad", "failed", error="ValueError: boom"),
        started("cut off"),
    ):
        study(event)
    study.end("KILLED")
    assert children(tracker, study.run_id) == {"trial bad": "FAILED", "trial cut off": "KILLED"}
    assert tracker.client.get_run(study.run_id).info.status == "KILLED"
    (bad,) = [
        run
        for run in tracker.client.search_runs([tracker.experiment_id])
        if run.info.run_name == "trial bad"
    ]
    assert bad.data.metrics == {"val_loss": 0.7}
    assert bad.data.params == {"model.width": "8"}
    assert tracker.client.list_artifacts(bad.info.run_id)[0].path == "error.txt"


def training(tracker: Tracker, folder: Path, run_id: str) -> TrainingWatcher:
    experiment = validate(
        {
            "name": "watched",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "mlp"},
        }
    )
    recorded = tracker.recorded(run_id)
    return TrainingWatcher(run_id, tracker, Lines(), experiment, folder, recorded=recorded)


def epoch(number: int) -> dict:
    metrics = {"train_loss": 1 / number, "val_loss": 2 / number}
    return {"kind": "epoch", "epoch": number, "step": 7 * number, "metrics": metrics, "at": 0.0}


def test_a_resumed_training_records_what_its_driver_had_no_time_to(make, tmp_path: Path) -> None:
    _, tracker, _ = make[0]()
    run_id = tracker.start("train")
    first = training(tracker, tmp_path, run_id)
    first(epoch(1))
    tracker.flush()
    first(epoch(2))  # and killed before it is written

    _, again, _ = make[0]()
    second = training(again, tmp_path, run_id)
    epochs = [epoch(n)["metrics"] for n in (1, 2, 3)]
    for _ in range(2):  # another replica 0 tells them again
        second({"kind": "history", "epochs": epochs, "steps": 7, "at": 0.0})
    second(epoch(4))
    again.finish(run_id)
    history = again.client.get_metric_history(run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(n, 2 / n) for n in (1, 2, 3, 4)]


def test_a_store_that_cannot_be_written_does_not_stop_training(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tracker, _ = make[0]()
    run_id = tracker.start("train")
    watcher = training(tracker, tmp_path, run_id)

    def full(*arguments: object, **options: object) -> None:
        raise MlflowException("database or disk is full")

    monkeypatch.setattr(store, "FLUSH_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", full)
        watcher(epoch(1))
        watcher(epoch(2))
    watcher(epoch(3))
    assert tracker.recorded(run_id) == 3
    assert len(tracker.client.get_metric_history(run_id, "val_loss")) == 3
