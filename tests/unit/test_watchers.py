"""What a training leaves in MLflow, also when its driver was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from lepton_ray.config import validate
from lepton_ray.jobs.watchers import TrainingWatcher
from lepton_ray.terminal import Silent, Terminal
from lepton_ray.tracking import store
from lepton_ray.tracking.store import Tracker
from tests import stores


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    return lambda: Tracker("watched", tmp_path / "artifacts")


def training(
    tracker: Tracker, folder: Path, run_id: str, terminal: Terminal | None = None
) -> TrainingWatcher:
    experiment = validate(
        {
            "name": "watched",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "mlp"},
        }
    )
    recorded = tracker.recorded(run_id)
    return TrainingWatcher(
        run_id, tracker, terminal or Silent(), experiment, folder, recorded=recorded
    )


def epoch(number: int) -> dict:
    metrics = {"train_loss": 1 / number, "val_loss": 2 / number}
    return {"kind": "epoch", "epoch": number, "step": 7 * number, "metrics": metrics, "at": 0.0}


def test_a_resumed_training_records_what_its_driver_had_no_time_to(make, tmp_path: Path) -> None:
    tracker = make()
    run_id = tracker.start("train")
    first = training(tracker, tmp_path, run_id)
    first(epoch(1))
    tracker.flush()
    first(epoch(2))  # and killed before it is written

    again = make()
    second = training(again, tmp_path, run_id)
    epochs = [epoch(n)["metrics"] for n in (1, 2, 3)]
    for _ in range(2):  # another replica 0 tells them again
        second({"kind": "history", "epochs": epochs, "steps": 7, "at": 0.0})
    second(epoch(4))
    again.finish(run_id)
    history = again.client.get_metric_history(run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(n, 2 / n) for n in (1, 2, 3, 4)]


def test_a_line_of_progress_repeats_the_last_epoch(make, tmp_path: Path) -> None:
    """A log shows only some of the lines, and may miss the epoch's own."""
    shown: list[str] = []

    class Log(Silent):
        def progress(self, text: str) -> None:
            shown.append(text)

    tracker = make()
    watcher = training(tracker, tmp_path, tracker.start("train"), Log())
    watcher(epoch(2))
    watcher({"kind": "progress", "step": 15, "steps": 30, "steps_per_s": 5.0, "at": 0.0})
    assert "step 15/30" in shown[-1]
    assert "epoch 2/" in shown[-1]
    assert "val_loss 1.0000" in shown[-1]


def test_a_store_that_cannot_be_written_does_not_stop_training(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = make()
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
