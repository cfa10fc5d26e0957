"""Many rows are prepared on the cluster, and become what one process makes of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.data import Dataset, csvs, dataset, hands
from lepton_ray.errors import DataError
from lepton_ray.jobs.hands import ClusterHands
from lepton_ray.priority import COMPUTES
from tests.terminal import Lines

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few thousand rows count as many."""
    monkeypatch.setattr(hands, "LARGE", 1)
    monkeypatch.setattr(csvs, "PIECE", 1 << 14)
    monkeypatch.setattr(dataset, "BLOCK", 1 << 16)


def frame(n: int = 6000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    gaps = np.where(rng.random(n) < 0.1, np.nan, rng.normal(0, 9, n).round(3))
    return pd.DataFrame(
        {
            "amount": gaps,
            "count": rng.integers(0, 50, n),
            "when": pd.date_range("2024-01-01", periods=n, freq="h").astype(str),
            "kind": np.char.add("k", rng.integers(0, 30, n).astype(str)),
            "said": np.where(rng.random(n) < 0.5, 'no, "never"\never', "yes"),
            "y": rng.choice(["p", "q"], n),
        }
    )


def load(files: list[Path], told: Lines | None = None, **section: Any) -> Dataset:
    asked = validate(
        {
            "name": "many",
            "data": {"kind": "table", "source": list(map(str, files)), "target": "y"}
            | {"preprocess": {"missing": "median"}}
            | section,
            "model": {"name": "mlp"},
        }
    )
    return data.load(asked.data, hands=ClusterHands(told) if told else None)


def written(folder: Path, suffix: str) -> list[Path]:
    """In two files, the second with its columns in another order."""
    rows = frame()
    files = [folder / f"1{suffix}", folder / f"2{suffix}"]
    for file, part in zip(files, (rows[:4500], rows[4500:][list(rows.columns[::-1])]), strict=True):
        part.to_csv(file, index=False) if suffix == ".csv" else part.to_parquet(
            file, row_group_size=1000
        )
    return files


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_become_the_same_on_the_cluster(tmp_path: Path, suffix: str) -> None:
    files, told = written(tmp_path, suffix), Lines()
    there, here = load(files, told), load(files)
    assert there.digest == here.digest
    assert there.preprocess.describe()[0] == here.preprocess.describe()[0]
    assert (there.schema, there.notes, there.bins) == (here.schema, here.notes, here.bins)
    for one, other in ((there.train, here.train), (there.test, here.test)):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)
    pieces = {"parts of files"} if suffix == ".csv" else {"row groups"}
    stages = {text.removeprefix("data   ").partition(":")[0] for text in told.progressed}
    assert stages >= pieces | {"columns to fit", "columns to check", "blocks of rows"}
    first = next(t for t in told.progressed if t.split(":")[0].endswith(*pieces))
    assert int(first.split()[-1]) > 4


def test_it_is_done_in_other_processes(tmp_path: Path) -> None:
    made = list(ClusterHands(Lines()).map("numbers", process_of, range(20), 20))
    assert os.getpid() not in {pid for pid, _ in made}
    assert {nice for _, nice in made} == {COMPUTES}, "who computes gives way"


def test_pieces_are_taken_a_few_before_their_turn() -> None:
    taken = []

    def pieces() -> Any:
        for number in range(100):
            taken.append(number)
            yield number

    made = ClusterHands(Lines()).map("numbers", str, pieces(), 100)
    assert next(made) == "0"
    assert len(taken) <= 8
    assert [*made] == [str(n) for n in range(1, 100)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("other", [False, True])
def test_files_that_other_machines_have_not_are_read_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, other: bool
) -> None:
    """The workers' folder is another: they find no file of that name there, or one that differs."""
    written(tmp_path, suffix)
    names = [Path(f"elsewhere-1{suffix}"), Path(f"elsewhere-2{suffix}")]
    for number, name in enumerate(names, 1):
        (tmp_path / f"{number}{suffix}").rename(tmp_path / name)
    made = []
    if other:
        there = ray.get(ray.remote(folder).remote())
        made = [there / name for name in names]
        for path in made:
            content = (tmp_path / path.name).read_bytes()
            path.write_bytes(content.replace(b",k1,", b",k2,") + b"1,2")
    try:
        monkeypatch.chdir(tmp_path)
        assert load(names, Lines()).digest == load(names).digest
    finally:
        for path in made:
            path.unlink()


def test_what_is_wrong_is_told_as_by_one_process(tmp_path: Path) -> None:
    files = written(tmp_path, ".csv")
    with files[1].open("a") as file:
        file.write("1,2\n")
    said = []
    for told in (Lines(), None):
        with pytest.raises(DataError, match="2.csv: every line has 6 cells") as raised:
            load(files, told)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_gap_that_is_refused_is_told(tmp_path: Path) -> None:
    files = written(tmp_path, ".csv")
    with pytest.raises(DataError, match="column 'amount' has no finite number in"):
        load(files, Lines(), preprocess={"missing": "refuse"})


def folder() -> Path:
    return Path.cwd()


def process_of(_: int) -> tuple[int, int]:
    return os.getpid(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
