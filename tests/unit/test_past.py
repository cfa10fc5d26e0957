"""Studies that are extended, and studies that teach others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lepton_ray.config.schema import Experiment
from lepton_ray.errors import InputError
from lepton_ray.jobs.runs import RunFolder
from lepton_ray.jobs.studies import JOURNAL, STUDY, StudyWatcher, overview
from lepton_ray.pipeline import past, search
from lepton_ray.terminal import Silent
from lepton_ray.tracking.store import Tracker
from lepton_ray.tuning.journal import Journal
from tests import stores
from tests.studies import LR, SPACE, Player, experiment

DIGEST = "d1"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))


def studied(asked: Experiment, command: str = "tune") -> RunFolder:
    """A run with a finished study."""
    folder = RunFolder.create(asked, command)
    folder.remember("data_digest", DIGEST)
    played = Player(asked, folder.path / STUDY).go()
    played.journal.close("all trials are done")
    folder.finish_stage("tune", {"trials": len(played.journal.finished)})
    folder.end("finished")
    return folder


# --- more trials ---------------------------------------------------------------------------------


def test_a_finished_study_is_opened_for_more_trials() -> None:
    asked = experiment(trials=3)
    folder = studied(asked)
    for total in (5, 10):
        again = search.extend(experiment(trials=3, goal=0.01), "tune", 5)
        assert again.uri == folder.uri
        assert again.stage("tune") is None
        assert again.recall("more_trials") == total
        again.finish_stage("tune", {})
    assert RunFolder.open(folder.uri).recall("more_trials") == 10


def test_a_study_of_another_space_is_not_extended_and_the_difference_is_told() -> None:
    studied(experiment(trials=3))
    other = experiment(space={LR: {"loguniform": [1e-4, 1e-2]}}, trials=3)
    with pytest.raises(InputError) as caught:
        search.extend(other, "tune", 5)
    said = str(caught.value)
    assert "model.width was searched, and is not now" in said
    assert f"{LR} is {{'loguniform': (0.0001, 0.01)}} now and was" in said
    assert "--from-study" in said
    with pytest.raises(InputError, match="train.epochs is 4 now and was 9"):
        search.extend(experiment(epochs=4, trials=3), "tune", 5)
    population = experiment(searcher="pbt", space={LR: SPACE[LR]})
    with pytest.raises(InputError, match="a population has as many trials as"):
        search.extend(population, "tune", 5)
    with pytest.raises(InputError, match="no finished study of 'tuning'.*without --add-trials"):
        search.extend(experiment(trials=3), "run", 5)


def test_a_resume_with_another_space_says_how_they_differ() -> None:
    RunFolder.create(experiment(), "tune")
    with pytest.raises(InputError, match="has changed since.*model.width was searched, and is not"):
        RunFolder.find_unfinished(experiment(space={LR: SPACE[LR]}), "tune")


# --- earlier studies -----------------------------------------------------------------------------


def finished(folder: RunFolder) -> list[Any]:
    return [r for r in Journal(folder.path / STUDY).finished if r.state == "finished"]


def test_results_on_the_same_data_and_settings_count() -> None:
    folder = studied(experiment(trials=6, scheduler="none"))
    wider = experiment(space={**SPACE, "train.clip": {"choice": [0.5, 1.0]}})
    for name in ("tuning", folder.uri, str(folder.path)):
        found = past.priors(experiment(searcher="tpe"), name, DIGEST)
        assert [p.comparable for p in found] == [True] * 6
        assert [p.value for p in found] == sorted(r.values[-1] for r in finished(folder))
        assert len(found[0].values) == 9
    assert "6 finished trials of tuning count as known" in past.describe(found, "tuning")
    assert all(p.comparable for p in past.priors(wider, "tuning", DIGEST)), "clip was none in both"


def test_other_data_other_settings_or_another_metric_leave_only_the_settings() -> None:
    studied(experiment(trials=4, scheduler="none"))
    for asked, digest in (
        (experiment(), "d2"),
        (experiment(epochs=4), DIGEST),
        (experiment(metric="val_accuracy"), DIGEST),
    ):
        found = past.priors(asked, "tuning", digest)
        assert [p.comparable for p in found] == [False] * 4
        assert found[0].params.keys() == SPACE.keys()
        assert "best of its settings are tried first" in past.describe(found, "tuning")


def test_values_outside_of_the_new_space_are_left_out() -> None:
    studied(experiment(trials=30, scheduler="none"))
    narrow = experiment(space={LR: {"loguniform": [1e-3, 1e-2]}})
    found = past.priors(narrow, "tuning", DIGEST)
    assert 0 < len(found) < 30
    assert all(1e-3 <= p.params[LR] <= 1e-2 and set(p.params) == {LR} for p in found)
    # The file says 16 for the width, which is not searched any more.
    assert {p.comparable for p in found} == {True, False}


def test_a_study_is_found_in_mlflow_by_its_run_alone(tmp_path: Path) -> None:
    asked = experiment(trials=4, scheduler="none", confirm={"top": 1, "seeds": 1})
    folder = RunFolder.create(asked, "tune")
    tags = {"lepton_ray.data_digest": DIGEST}
    watcher = StudyWatcher(asked, Tracker("tuning", tmp_path / "a"), folder, Silent(), tags)
    player = Player(asked, folder.path / STUDY)
    for number, start in enumerate(iter(player.decisions.next, "over")):
        assert not isinstance(start, str)
        watcher({"kind": "trial_start", "trial": start.id, "params": start.params})
        for epoch in range(1, 10):
            metrics = {"val_loss": 1.0 / epoch + number}
            player.decisions.report(number, epoch, metrics, last=epoch == 9)
            event = {"kind": "trial_result", "trial": start.id, "epoch": epoch}
            watcher({**event, "metrics": metrics})
        record = player.decisions.end(number, finished=True, metrics=metrics)
        watcher({"kind": "trial_end", "trial": record.id, "record": record})
    watcher.close("FINISHED")
    elsewhere = experiment(searcher="tpe").model_copy(update={"storage": str(tmp_path / "other")})
    found = past.priors(elsewhere, watcher.run_id, DIGEST)
    assert [p.comparable for p in found] == [True] * 4, "and not the one with another seed"
    assert found[0].values == pytest.approx([1.0 / e for e in range(1, 10)])
    assert past.priors(elsewhere, "tuning", DIGEST) == found, "by the experiment's name there"


def test_a_study_of_another_machine_is_extended_and_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(trials=3, scheduler="none").model_copy(
        update={"storage": f"file://{tmp_path}/store"}
    )
    folder = RunFolder.create(asked, "tune")
    folder.remember("data_digest", DIGEST)
    with folder.mirrored(JOURNAL):
        played = Player(asked, folder.path / STUDY).go()
    folder.finish_stage("tune", {"trials": 3})
    folder.end("finished")
    (tmp_path / "another").mkdir()
    monkeypatch.chdir(tmp_path / "another")
    priors = past.priors(asked, asked.name, DIGEST)
    assert {p.value for p in priors} == {r.values[-1] for r in played.journal.finished}
    again = search.extend(asked, "tune", 2)
    with again.mirrored(JOURNAL):
        journal = Journal(again.path / STUDY)
    assert journal.finished == played.journal.finished


def test_a_study_that_does_not_exist_is_told_with_the_nearest() -> None:
    studied(experiment(trials=1))
    with pytest.raises(InputError, match="no study 'tunning'.*did you mean 'tuning'"):
        past.find("tunning", experiment())
    with pytest.raises(InputError, match="none has a setting that is searched here"):
        past.priors(experiment(space={"train.ema": {"uniform": [0.5, 0.9]}}), "tuning", DIGEST)


def test_the_last_study_of_each_experiment_is_shown() -> None:
    folder = studied(experiment(trials=3))
    (shown,) = overview().values()
    uri, lines, state = shown
    assert uri == str(Path(folder.uri))
    assert state["stands"] == "ended: all trials are done"
    assert lines[0].startswith("tune   3 of 3 trials done")
    assert overview("other") == {}
