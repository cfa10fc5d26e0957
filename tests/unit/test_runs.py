"""A run's folder: found again from anywhere, and clear about what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import InputError, StoreError
from lepton_ray.jobs.runs import RunFolder


def experiment(storage: str, **sections: object) -> Experiment:
    return validate(
        {
            "name": "kept",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "mlp"},
            "storage": storage,
            **sections,
        }
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_goes_on_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    asked = experiment(f"{scheme}{tmp_path}/store")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    first = RunFolder.create(asked, "train")
    first.finish_stage("train", {"steps": 7})
    first.remember("training_run", "abc")

    monkeypatch.chdir(there)
    again = RunFolder.find_unfinished(asked, "train")
    assert (again.id, again.stage("train"), again.recall("training_run")) == (
        first.id,
        {"steps": 7},
        "abc",
    )
    assert again.experiment() == asked
    assert again.checkpoints == f"{scheme}{tmp_path}/store/kept/{first.id}/checkpoints"
    local = tmp_path / "store" if not scheme else there / "lepton_results"
    assert again.path.absolute() == local / "kept" / first.id
    assert again.path.is_dir()

    again.end("finished")
    with pytest.raises(InputError, match="no unfinished 'train' of 'kept'"):
        RunFolder.find_unfinished(asked, "train")


def test_the_last_unfinished_one_of_the_command_is_taken(tmp_path: Path) -> None:
    asked = experiment(str(tmp_path))
    made = [RunFolder.create(asked, command) for command in ("train", "train", "tune")]
    assert len({folder.id for folder in made}) == 3  # within one second
    assert RunFolder.find_unfinished(asked, "train").id == made[1].id


def test_a_changed_experiment_is_not_resumed(tmp_path: Path) -> None:
    RunFolder.create(experiment(str(tmp_path)), "train")
    changed = experiment(str(tmp_path), train={"epochs": 3})
    with pytest.raises(InputError, match="has changed since the run"):
        RunFolder.find_unfinished(changed, "train")


@pytest.mark.parametrize("storage", ["nowhere://bucket/x", "/proc/nowhere"])
def test_a_storage_that_cannot_be_used_is_named(storage: str) -> None:
    with pytest.raises(StoreError, match=f"storage '{storage}"):
        RunFolder.create(experiment(storage), "train")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        RunFolder.open(str(tmp_path))
