"""A run's folder: found again from anywhere, and clear about what it cannot do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import InputError, StoreError
from lepton_ray.jobs import mirror
from lepton_ray.jobs.mirror import Mirror
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


def test_a_run_is_of_one_data_set(tmp_path: Path) -> None:
    folder = RunFolder.create(experiment(str(tmp_path)), "train")
    folder.is_of_data("a" * 64)
    folder.is_of_data("a" * 64)
    again = RunFolder.open(folder.uri)
    with pytest.raises(InputError, match="digest aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        again.is_of_data("b" * 64)
    assert again.recall("data_digest") == "a" * 64


@pytest.mark.parametrize("storage", ["nowhere://bucket/x", "/proc/nowhere"])
def test_a_storage_that_cannot_be_used_is_named(storage: str) -> None:
    with pytest.raises(StoreError, match=f"storage '{storage}"):
        RunFolder.create(experiment(storage), "train")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        RunFolder.open(str(tmp_path))


# --- files that grow -----------------------------------------------------------------------------

GROWS = "study/trials.jsonl"


def test_a_growing_file_goes_on_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(f"file://{tmp_path}/store")
    texts = []
    for number, machine in enumerate(["one", "two", "one"]):
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / machine)
        run = (
            RunFolder.find_unfinished(asked, "tune") if number else RunFolder.create(asked, "tune")
        )
        with run.mirrored(GROWS):
            file = run.path / GROWS
            file.parent.mkdir(exist_ok=True)
            with file.open("a") as lines:
                lines.write(f"{number}\n")
        texts.append(file.read_text())
    assert texts == ["0\n", "0\n1\n", "0\n1\n2\n"]
    assert (tmp_path / "store" / "kept" / run.id / GROWS).read_text() == texts[-1]


def test_a_run_stored_elsewhere_can_be_looked_at_from_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(f"file://{tmp_path}/store")
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    run = RunFolder.create(asked, "tune")
    monkeypatch.chdir(tmp_path / "two")
    RunFolder.find_unfinished(asked, "tune").finish_stage("tune", {"trials": 3})
    seen = RunFolder.open(str(Path("lepton_results/kept") / run.id))
    assert (seen.stage("tune"), seen.experiment()) == ({"trials": 3}, asked)


def test_what_grows_is_sent_while_it_grows_and_a_store_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "EVERY_S", 0.01)
    there, here = tmp_path / "store" / "copy", tmp_path / "file"

    def wait_for(seen: Any) -> None:
        until = time.monotonic() + 60
        while not seen():
            assert time.monotonic() < until
            time.sleep(0.01)

    with Mirror(pafs.LocalFileSystem(), str(there), here):
        there.parent.write_text("in the folder's place")
        here.write_text("a")
        wait_for(lambda: "is not copied to" in caplog.text)
        there.parent.unlink()
        wait_for(lambda: there.exists() and there.read_text() == "a")
        here.write_text("ab")
        wait_for(lambda: there.read_text() == "ab")
        here.write_text("abc")
    assert there.read_text() == "abc"
    assert caplog.text.count("is not copied to") == 1
