"""What `lepton-ray status` lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_ray.pipeline import status
from lepton_ray.terminal import Silent
from lepton_ray.tracking.store import Tracker
from tests import stores


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_runs_are_listed_newest_first_and_no_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    terminal = Lines()
    assert status.runs(None, terminal) == []
    assert terminal.said == ["no runs yet"]
    for name in ("digits", "adult"):
        tracker = Tracker(name, tmp_path)
        study = tracker.start("study 1", tags={"lepton_ray.kind": "study"})
        tracker.start("trial 1", tags={"lepton_ray.kind": "trial"}, parent=study)
        run = tracker.start("train 1", tags={"lepton_ray.kind": "training"})
        tracker.metrics(run, {"val_loss": 0.5, "train_loss": 0.1}, 1)
        tracker.finish(run)
    found = status.runs("digits", terminal)
    assert [(r["name"], r["status"]) for r in found] == [
        ("train 1", "FINISHED"),
        ("study 1", "RUNNING"),
    ]
    assert found[0]["metrics"] == {"val_loss": 0.5}
    assert "digits" in terminal.said[1]
    assert {r["experiment"] for r in status.runs(None, terminal)} == {"digits", "adult"}
    assert status.runs("none", terminal) == []
