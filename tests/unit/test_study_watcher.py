"""What a study leaves in MLflow and on the terminal, also when its driver was killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from lepton_ray.cli.terminal import Terminal
from lepton_ray.config import validate
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.jobs.studies import STUDY, StudyWatcher
from lepton_ray.tracking.store import Tracker
from lepton_ray.tuning import status
from lepton_ray.tuning.journal import Journal, Report, TrialRecord, TrialStart
from tests import stores
from tests.studies import Player
from tests.studies import experiment as played_experiment

PARAMS = {"model.width": 8}


class Lines:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.progressed: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, text: str) -> None:
        self.progressed.append(text)


class Study:
    """A journal and its watcher, told the same."""

    def __init__(self, folder: RunFolder, watcher: StudyWatcher) -> None:
        self.watcher = watcher
        self.journal = Journal(folder.path / STUDY)
        self.journal.open({"space": {}, "metric": ["val_loss"]})
        watcher({"kind": "opened", "journal": self.journal})

    def start(self, number: int) -> None:
        if number not in self.journal.starts:
            self.journal.start(TrialStart(number=number, params=PARAMS))
        self.watcher({"kind": "trial_start", "trial": f"{number:04d}", "params": PARAMS})

    def report(self, number: int, epoch: int, value: float, *, told: bool = True) -> None:
        self.journal.report(number, Report(epoch, value, ""))
        if told:
            event = {"kind": "trial_result", "trial": f"{number:04d}", "epoch": epoch}
            self.watcher({**event, "metrics": {"val_loss": value, "train_loss": 0.1}})

    def end(self, number: int, state: Any, *, told: bool = True, **rest: Any) -> None:
        values = [r.value for r in self.journal.reports[number]]
        metrics = {"val_loss": values[-1]} if values else {}
        given = {"params": PARAMS, "values": values, "metrics": metrics, **rest}
        record = TrialRecord(number=number, state=state, **given)
        self.journal.finish(record)
        if told:
            self.watcher({"kind": "trial_end", "trial": record.id, "record": record})


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
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

    def study() -> tuple[Study, Tracker, Lines]:
        tracker, lines = Tracker("watched", tmp_path / "artifacts"), Lines()
        watcher = StudyWatcher(experiment, tracker, RunFolder.open(folder.uri), lines, {})
        return Study(folder, watcher), tracker, lines

    return study


def children(tracker: Tracker, parent: str) -> dict[str, Any]:
    found = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    return {run.info.run_name: run for run in found}


def statuses(tracker: Tracker, parent: str) -> dict[str, str]:
    return {name: run.info.status for name, run in children(tracker, parent).items()}


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_trial_is_a_child_with_its_state(make) -> None:
    study, tracker, _ = make()
    for number, state, rest in (
        (0, "finished", {"weights_sha256": "c0ffee"}),
        (1, "pruned", {"reason": "2 of 2 at epoch 1"}),
        (2, "failed", {"error": "ValueError: boom"}),
    ):
        study.start(number)
        study.report(number, 1, 0.5 + number)
        study.end(number, state, **rest)
    study.start(3)
    study.watcher.close("KILLED")
    parent = study.watcher.run_id
    assert statuses(tracker, parent) == {
        "trial 0000": "FINISHED",
        "trial 0001": "KILLED",
        "trial 0002": "FAILED",
        "trial 0003": "KILLED",
    }
    assert tracker.client.get_run(parent).info.status == "KILLED"
    found = children(tracker, parent)
    assert found["trial 0001"].data.tags["lepton_ray.state"] == "pruned"
    assert found["trial 0001"].data.tags["lepton_ray.reason"] == "2 of 2 at epoch 1"
    assert found["trial 0000"].data.params == {"model.width": "8"}
    assert found["trial 0000"].data.metrics == {"val_loss": 0.5, "train_loss": 0.1}
    bad = found["trial 0002"].info.run_id
    assert tracker.client.list_artifacts(bad)[0].path == "error.txt"
    history = tracker.client.get_metric_history(found["trial 0000"].info.run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5)], "the last epoch is there once"


def test_a_resumed_study_keeps_its_runs_and_gets_what_mlflow_lacks(make) -> None:
    first, tracker, _ = make()
    first.start(0)
    first.report(0, 1, 0.5)
    first.start(1)
    first.report(1, 1, 0.7)
    parent = first.watcher.run_id
    wait_until(lambda: len(statuses(tracker, parent)) == 2)
    ids = {name: run.info.run_id for name, run in children(tracker, parent).items()}
    wait_until(lambda: children(tracker, parent)["trial 0001"].data.metrics)
    # The driver is killed: what follows is in the journal, and MLflow never heard of it.
    first.report(0, 2, 0.4, told=False)
    first.end(0, "finished", told=False)

    second, tracker, lines = make()
    assert second.watcher.run_id == parent
    assert tracker.client.get_run(parent).info.status == "RUNNING"
    assert lines.progressed[0].splitlines()[0] == (
        "tune   1 of 4 trials done, 1 running, best val_loss 0.4000"
    )
    second.start(1)
    second.report(1, 2, 0.6)
    second.end(1, "finished")
    second.watcher.close("FINISHED", second.journal.ended[0])
    found = children(tracker, parent)
    assert {name: run.info.run_id for name, run in found.items()} == ids
    assert set(statuses(tracker, parent).values()) == {"FINISHED"}
    for name, values in (("trial 0000", [0.5, 0.4]), ("trial 0001", [0.7, 0.6])):
        history = tracker.client.get_metric_history(ids[name], "val_loss")
        assert [m.value for m in sorted(history, key=lambda m: m.step)] == values
    assert tracker.client.get_run(parent).data.tags["best.trial"] == "0000"


def test_what_mlflow_refuses_for_a_while_is_written_later(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, tracker, lines = make()
    refused = []
    real = Tracker.batch

    def batch(self: Tracker, *args: Any, **kwargs: Any) -> None:
        if len(refused) < 2:
            refused.append(1)
            raise MlflowException("database is locked")
        real(self, *args, **kwargs)

    monkeypatch.setattr(Tracker, "batch", batch)
    study.start(0)
    study.report(0, 1, 0.5)
    study.end(0, "finished")
    study.watcher.close("FINISHED")
    assert len(refused) == 2
    assert statuses(tracker, study.watcher.run_id) == {"trial 0000": "FINISHED"}
    assert lines.said == []


def test_a_store_that_stays_away_does_not_end_the_study(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _, lines = make()

    def gone(self: Tracker, *args: Any, **kwargs: Any) -> None:
        raise MlflowException("no connection")

    monkeypatch.setattr(Tracker, "batch", gone)
    study.start(0)
    study.report(0, 1, 0.5)
    study.end(0, "finished")
    study.watcher.close("FINISHED")
    assert "MLflow took not all of the study" in lines.said[0]


# --- the table -----------------------------------------------------------------------------------


def test_how_a_study_stands_is_read_from_its_journal_alone(tmp_path: Path) -> None:
    asked = played_experiment(trials=6, budget={"minutes": 60, "usd": 2, "usd_per_hour": 1})
    Player(asked, tmp_path, usd_per_hour=lambda: 1.0).go()
    journal = Journal(tmp_path, read_only=True)
    assert asked.tune is not None
    state = status.state(asked.tune, journal)
    assert state["ended"] == 6
    assert state["finished"] + state["pruned"] == 6
    assert state["table"][0]["trial"] == state["best"]["trial"]
    head, title, *rows = status.lines(asked.tune, journal)
    assert head.startswith("tune   6 of 6 trials done, 0 running, best val_loss ")
    assert "s left, $0.00 of $2.00 spent" in head
    assert title.split() == ["trial", "state", "epoch", "val_loss", "seconds"]
    assert len(rows) == 6
    assert "train.optimizer.lr=" in rows[0]


def test_a_table_replaces_the_one_before_and_elsewhere_its_first_line_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda: (20, 4))
    live = Terminal(quiet=False)
    live.progress("one\ntwo " + "x" * 30 + "\nthree\nfour\nfive")
    live.progress("next")
    live.say("said")
    out = capsys.readouterr().out
    assert out.startswith("one\ntwo xxxxxxxxxxxxxxx\nthree\r\x1b[2A\x1b[Jnext\r\x1b[Jsaid\n")

    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    monkeypatch.setattr("lepton_ray.cli.terminal.PLAIN_PROGRESS_S", 0)
    Terminal(quiet=False).progress("one\ntwo")
    assert capsys.readouterr().out == "one\n"
