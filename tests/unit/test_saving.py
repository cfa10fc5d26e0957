"""What must be saved, or gone, before others hear of what has happened."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ray import data
from lepton_ray.training import membership
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.loop import Replica
from lepton_ray.training.membership import DoubtError, Fixed, OutvotedError
from tests.unit.test_exactness import experiment


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointFolder:
    """One on a disk so slow that a save is in flight for many steps."""
    write = CheckpointFolder.save

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(CheckpointFolder, "save", slowly)
    return CheckpointFolder(str(tmp_path))


def replica(folder: CheckpointFolder, **options: Any) -> Replica:
    asked = experiment("mlp", "sgd")  # which saves every 3 steps and links every 2
    return Replica(asked, data.load(asked.data), checkpoints=folder, **options)


class ToldByAnother(Fixed):
    """Of a group that is asked to pause, one that has not heard so itself yet."""

    leaving = False


@pytest.mark.parametrize("kind", [Fixed, ToldByAnother])
def test_a_replica_has_paused_when_what_it_would_lose_is_saved(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, kind: type[Fixed]
) -> None:
    monkeypatch.setattr(membership, "PAUSE_S", 0.0)
    paused: list[tuple[int, int]] = []
    asked: list[bool] = []

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "paused":
            paused.append((event["step"], folder.list()[-1].step))

    here = replica(folder, membership=kind(should_pause=lambda: bool(asked)), report=report)
    for _ in range(4):
        here.advance()
    asked.append(True)
    here.advance()
    assert paused == [(5, 5)]


@pytest.mark.parametrize("wrong", [0, 2])
def test_no_checkpoint_of_void_steps_lands_after_a_vote(
    folder: CheckpointFolder, wrong: int
) -> None:
    """Of step 3, in flight when step 4 is found to differ; step 2 was the last that all agreed on.

    When it is replica 0 that is wrong, another drops what is void, once it knows of the vote.
    """
    here = replica(folder)
    for _ in range(3):
        here.advance()
    there: list[list[int]] = []

    def gather_json(mine: list[str]) -> list[list[str]]:
        there.append([saved.step for saved in folder.list()])
        return [["other"] * len(mine) if rank == wrong else mine for rank in range(3)]

    here.peers = SimpleNamespace(rank=0, size=3, hosts=3, gather_json=gather_json)
    here._membership.lasting = True
    here.state.links.append((4, "differs"))
    links = ["differs" if rank == wrong else "common" for rank in range(3)]
    with pytest.raises(OutvotedError if wrong == 0 else DoubtError):
        here._settle(links, here.state.model.state_dict(), [])
    assert there == [[3]]
    here._saver.wait()
    assert [saved.step for saved in folder.list()] == ([3] if wrong == 0 else [])
