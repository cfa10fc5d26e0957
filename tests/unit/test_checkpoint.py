"""Checkpoints: whole or absent, the last whole one wins, and limits hold."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moto.server import ThreadedMotoServer

from lepton_ray.errors import CheckpointError
from lepton_ray.training import checkpoint, digest
from lepton_ray.training.checkpoint import CheckpointFolder
from lepton_ray.training.saving import Checkpointer
from lepton_ray.training.state import TrainState


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), value), "n": torch.tensor(3)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    assert folder.load_last() is None
    folder.save(5, tensors(1.5), {"step": 5, "history": [{"loss": 0.25}]})
    loaded, values = folder.load_last()
    assert torch.equal(loaded["w"], tensors(1.5)["w"])
    assert values == {"step": 5, "history": [{"loss": 0.25}]}


@pytest.mark.parametrize("damage", ["flip", "truncate", "no_manifest", "bad_manifest"])
def test_a_damaged_one_is_skipped_for_the_one_before(tmp_path: Path, damage: str, caplog) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=3)
    folder.save(1, tensors(1.0), {"step": 1})
    last = Path(folder.save(2, tensors(2.0), {"step": 2}).path)
    data, manifest = last / checkpoint.DATA, last / checkpoint.MANIFEST
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[-7] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(content[:-10])
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    assert folder.load_last()[1] == {"step": 1}
    assert damage == "no_manifest" or "skipping a checkpoint" in caplog.text


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=2)
    for step in range(1, 6):
        folder.save(step, tensors(step), {"step": step})
    assert [s.step for s in folder.list()] == [4, 5]


def test_one_from_before_the_last_comparison_stays(tmp_path: Path) -> None:
    """Where replicas turn out to differ, training goes back to it."""
    folder = CheckpointFolder(str(tmp_path), keep=2)
    for step in (30, 60, 90, 120):
        links = [[50, "a"]] if step >= 60 else []
        folder.save(step, tensors(step), {"step": step, "links": links})
        assert folder.list()[0].step == 30
    folder.drop_after(50)
    assert folder.load_last()[1]["step"] == 30
    for step in (60, 101, 110, 120):
        folder.save(step, tensors(step), {"step": step, "links": [[100, "b"]]})
    assert [s.step for s in folder.list()] == [60, 110, 120]


def test_a_save_that_fails_leaves_an_earlier_one_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=1)
    folder.save(7, tensors(1.0), {"step": 7})

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (7, 8):
        with pytest.raises(CheckpointError, match="no space left"):
            folder.save(step, tensors(2.0), {"step": step})
    assert [s.step for s in folder.list()] == [7]
    assert torch.equal(folder.load_last()[0]["w"], tensors(1.0)["w"])


def test_those_at_a_multiple_stay_besides_the_last_ones(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=2, keep_every=4)
    for step in range(1, 12):
        folder.save(step, tensors(step), {"step": step})
    assert [s.step for s in folder.list()] == [4, 8, 10, 11]


def test_the_byte_limit_drops_the_oldest_but_never_the_last(tmp_path: Path) -> None:
    one = CheckpointFolder(str(tmp_path)).save(0, tensors(0), {"step": 0}).bytes
    folder = CheckpointFolder(str(tmp_path), keep=9, max_bytes=2.5 * one)
    for step in range(1, 5):
        folder.save(step, tensors(step), {"step": step})
    assert [s.step for s in folder.list()] == [3, 4]
    tight = CheckpointFolder(str(tmp_path), keep=9, max_bytes=1)
    tight.save(5, tensors(5), {"step": 5})
    assert [s.step for s in tight.list()] == [5]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may be longer than 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_last_good_one_and_is_reported(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    folder.save(1, tensors(1.0), {"step": 1})
    events: list[dict] = []
    writer = Checkpointer(folder, events.append)
    with full_disk():
        with pytest.raises(CheckpointError, match="File too large"):
            folder.save(2, tensors(2.0), {"step": 2})
        writer.save(3, tensors(3.0), {"step": 3})
        writer.wait()
    assert [e["kind"] for e in events] == ["checkpoint_failed"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"], "nothing half-written"
    assert folder.load_last()[1] == {"step": 1}


def test_what_a_lost_replica_left_half_written_goes(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    half = Path(folder.save(1, tensors(1.0), {"step": 1}).path)
    (half / checkpoint.MANIFEST).unlink()
    (half / f"{checkpoint.DATA}.0.tmp").write_bytes(b"half")
    folder.save(2, tensors(2.0), {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000002"]


def test_a_uri_of_a_file_system_works_like_a_path(tmp_path: Path) -> None:
    CheckpointFolder(f"file://{tmp_path}").save(7, tensors(7.0), {"step": 7})
    assert CheckpointFolder(str(tmp_path)).load_last()[1] == {"step": 7}


def test_a_store_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the six seconds that the client gives it by itself."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    store = ThreadedMotoServer("127.0.0.1", port=0)
    store.start()
    host, port = store.get_host_and_port()
    where = f"region=us-east-1&scheme=http&endpoint_override={host}:{port}"
    uri = f"s3://lepton/run?{where}&allow_bucket_creation=true"
    folder = CheckpointFolder(uri)
    folder.save(1, tensors(1.0), {"step": 1})
    store.stop()
    again = ThreadedMotoServer(host, port=port)  # moto keeps what it holds in this process
    back = threading.Timer(8.0, again.start)
    back.start()
    try:
        folder.save(2, tensors(2.0), {"step": 2})
        loaded, values = folder.load_last()
        assert values == {"step": 2}
        assert torch.equal(loaded["w"], tensors(2.0)["w"])
        assert [saved.step for saved in folder.list()] == [1, 2]
    finally:
        back.join()
        again.stop()


def test_a_dump_stays_as_it_was_while_training_goes_on() -> None:
    """It is written by another thread, beside the next steps."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(model=model, optimizer=optimizer, links=[(5, "a")], history=[{"loss": 1.0}])

    def step() -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    dumped, values = state.dump()
    before = (digest.state_sha256(dumped), json.dumps(values))
    step()
    state.links.append((10, "b"))
    state.history.append({"loss": 0.5})
    assert (digest.state_sha256(dumped), json.dumps(values)) == before
