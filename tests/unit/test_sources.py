"""Where rows come from: files, patterns, folders, functions; and files that are none."""

from __future__ import annotations

import decimal
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_ray import data
from lepton_ray.config.schema import TableData
from lepton_ray.data import csvs, frames
from lepton_ray.data.schema import Column, Schema
from lepton_ray.errors import DataError
from lepton_ray.serving.requests import columns_of
from lepton_ray.serving.tables import from_parquet
from tests import hub


def rows(first: int = 0, n: int = 40) -> pd.DataFrame:
    numbers = np.arange(first, first + n)
    return pd.DataFrame({"a": numbers, "b": numbers / 8, "c": "x", "y": ["p", "q"] * (n // 2)})


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    (folder / "more").mkdir(parents=True)
    rows(0).to_csv(folder / "1.csv", index=False)
    rows(40).to_parquet(folder / "2.parquet")
    rows(80)[["y", "c", "b", "a"]].to_json(
        folder / "more" / "3.jsonl", orient="records", lines=True
    )
    (folder / "_SUCCESS.csv").write_text("")
    (folder / "notes.txt").write_text("not rows")
    return folder


def from_function() -> dict[str, Any]:
    return dict(rows(0, 120).items())


def from_nothing() -> int:
    return 3


@pytest.mark.parametrize(
    "source",
    [
        "{parts}",
        ["{parts}/1.csv", "{parts}/2.parquet", "{parts}/more/3.jsonl"],
        ["{parts}/[12].*", "{parts}/more"],
        "file://{parts}",
        "file://{parts}/*",
        "tests.unit.test_sources:from_function",
    ],
)
def test_rows_of_all_that_is_named_come_one_after_the_other(parts: Path, source: Any) -> None:
    named = [source] if isinstance(source, str) else source
    frame = frames.read(tuple(name.format(parts=parts) for name in named))
    pd.testing.assert_frame_equal(frame[["a", "b", "c", "y"]], rows(0, 120), check_dtype=False)
    section = {"kind": "table", "source": named, "target": "y"}
    assert TableData.model_validate(section).source == tuple(named)


ON_THE_HUB = """
from lepton_ray.data import frames
from lepton_ray.errors import DataError
print(frames.read("hf://datasets/owner/films/parts/[12].parquet")["a"].tolist())
print(frames.read("hf://datasets/owner/films")["a"].tolist())
for wrong in ("hf://datasets/owner/none", "hf://datasets/owner/films/none.csv"):
    try:
        frames.read(wrong)
    except DataError as error:
        print(str(error).splitlines()[0])
"""


def test_rows_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    """By the hub's own client, which takes its address when it is first imported."""
    folder = tmp_path / "films" / "parts"
    folder.mkdir(parents=True)
    for part in (1, 2, 3):
        rows(10 * part, 10).to_parquet(folder / f"{part}.parquet")
    with hub.serving(tmp_path / "films", "owner/films") as address:
        told = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB],
            env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    assert told[:2] == [str([*range(10, 30)]), str([*range(10, 40)])]
    assert "'hf://datasets/owner/none' cannot be read" in told[2]
    assert "'hf://datasets/owner/films/none.csv' does not exist" in told[3]


def test_parts_of_other_columns_are_named(parts: Path) -> None:
    rows().rename(columns={"b": "bb"}).to_csv(parts / "4.csv", index=False)
    said = r"4.csv: must have the columns of .*1.csv, but lacks 'b'"
    with pytest.raises(DataError, match=said):
        frames.read(str(parts))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.csv", "'nowhere.csv' does not exist"),
        ("{parts}/*.parq", "there is no file that ends with .csv, .parquet, .jsonl"),
        ("{parts}/notes.txt", "must end with .csv, .parquet, .jsonl"),
        ("sftp://host/rows.csv", "cannot be opened"),
        ("tests.unit.test_sources:no_such", "AttributeError: .*no_such"),
        ("tests.unit.test_sources:from_nothing", "must return a pandas data frame .* returned int"),
    ],
)
def test_a_source_that_is_none_is_named(parts: Path, source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        frames.read(source.format(parts=parts))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "a,y\n1,p\n2\n",
            "every line has 2 cells, as the header has, but .*got 1",
        ),
        ("a,y\n1,p\n2,q,r\n", "Expected 2 columns, got 3"),
        ("", "is empty: a CSV starts with a line that names its columns"),
        ("a,y,a\n1,p,2\n", "a column is named once, but 'a' is there twice"),
        ('"price\n(EUR)",y\n1,p\n', "the name of a column is one line"),
        (b"a,y\n1,caf\xe9\n", "must be in UTF-8, but has byte 0xe9 .*iconv -t utf-8"),
        (b"a,caf\xe9\n1,p\n", "must be in UTF-8, but has byte 0xe9"),
    ],
)
def test_a_csv_that_is_none_is_named(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        frames.read(str(path))


def test_cells_become_what_all_of_a_column_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "\ufeffwhole,gap,real,truth,code,text,empty\n"
        '1,1,1e3,True,007,"a, ""b""\nc",\n'
        " 2,NA,-.5,false,12,NA,\n"
    )
    frame = frames.read(str(tmp_path / "t.csv"), texts=["text"], as_written=["code"])
    kinds = {name: frame[name].dtype.kind for name in ("whole", "gap", "real", "truth", "empty")}
    assert kinds == {"whole": "i", "gap": "f", "real": "f", "truth": "b", "empty": "f"}
    assert frame["whole"].tolist() == [1, 2]
    assert frame["real"].tolist() == [1000, -0.5]
    assert frame["code"].tolist() == ["007", "12"]
    assert frame["text"].tolist() == ['a, "b"\nc', "NA"]
    assert np.isnan(frame["gap"][1])


def test_whole_numbers_that_no_float_holds_stay_texts_beside_a_gap(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,y\n9007199254740993,1\n,0\n")
    frame = frames.read(str(tmp_path / "t.csv"))
    assert frame["id"].fillna("").tolist() == ["9007199254740993", ""]


def test_decimals_of_a_database_are_numbers(tmp_path: Path) -> None:
    prices = pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")], pa.decimal128(9, 2))
    pq.write_table(pa.table({"price": prices, "y": ["a", "b", "a"]}), tmp_path / "t.parquet")
    frame = frames.read(str(tmp_path / "t.parquet"))
    assert frame["price"].fillna(-1).tolist() == [1.5, -1, 2.25]
    schema = Schema(columns=(Column(name="price", kind="number", optional=True),), target="y")
    body = io.BytesIO()
    pq.write_table(pa.table({"price": prices}), body)
    asked = columns_of(schema, from_parquet(schema, body.getvalue(), 10, 1 << 20))
    assert np.nan_to_num(asked["price"], nan=-1).tolist() == [1.5, -1, 2.25]


def test_a_word_for_nothing_is_a_word_among_words(tmp_path: Path) -> None:
    """Of numbers it is a gap: NA is Namibia, too, and None a class."""
    (tmp_path / "t.csv").write_text("n,word,code\n1,NA,NA\nNA,EU,None\n3,,\n")
    frame = frames.read(str(tmp_path / "t.csv"), as_written=["code"])
    assert frame["n"].fillna(-1).tolist() == [1, -1, 3]
    assert frame["word"].fillna("").tolist() == ["NA", "EU", ""]
    assert frame["code"].fillna("").tolist() == ["NA", "None", ""]


def test_rows_behind_many_blocks_are_of_one_type(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lepton_ray.data.csvs.BLOCK", 1 << 10)
    lines = [f"{n},{n}" for n in range(3000)] + ["x,0.5"]
    (tmp_path / "t.csv").write_text("\n".join(["text,number", *lines]))
    frame = frames.read(str(tmp_path / "t.csv"))
    assert frame["text"].tolist()[-2:] == ["2999", "x"]
    assert frame["number"].tolist()[-2:] == [2999, 0.5]


QUOTED = 'a,"said, or ""said""",y\n' + "".join(
    f'{n},"{n} lines\n{n % 3 * "more, "}\nof ""it""",{"pq"[n % 2]}\n' for n in range(900)
)
STRAY = "a,inches,y\n" + "".join(f'{n},{n}",{"pq"[n % 2]}\n' for n in range(900))


@pytest.mark.parametrize("content", [QUOTED, QUOTED.replace("\n", "\r\n"), STRAY])
def test_parts_of_a_csv_are_whole_rows(tmp_path: Path, monkeypatch: Any, content: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content, newline="")
    whole = frames.read(str(path))
    monkeypatch.setattr(csvs, "PIECE", 1 << 10)
    if content is not STRAY:  # whose quotes close nothing
        monkeypatch.setattr(csvs, "_all_rows", None)
    pd.testing.assert_frame_equal(frames.read(str(path)), whole)
    assert len(whole) == 900


def test_columns_of_parquet_files_are_of_what_holds_both(tmp_path: Path) -> None:
    """Whole numbers with gaps, texts that are stored as categories, an index that is no column."""
    first = pd.DataFrame({"n": [1, 2], "s": pd.Categorical(["a", "b"]), "d": [True, False]})
    second = pd.DataFrame({"d": [True, True], "s": ["c", None], "n": [0.5, None]})
    first.index = pd.Index([7, 8], name="id")
    first.to_parquet(tmp_path / "1.parquet")
    second.to_parquet(tmp_path / "2.parquet")
    pq.write_table(
        pa.table({"n": [4, None], "s": ["d", "e"], "d": [True, False]}), tmp_path / "3.parquet"
    )
    frame = frames.read(str(tmp_path))
    assert list(frame.columns) == ["n", "s", "d"]
    np.testing.assert_array_equal(frame["n"], [1, 2, 0.5, np.nan, 4, np.nan])
    assert frame["s"].isna().tolist() == [False] * 3 + [True] + [False] * 2
    assert frame["s"].dropna().tolist() == ["a", "b", "c", "d", "e"]
    assert frame["d"].tolist() == [True, False, True, True, True, False]
    widths = {"f": np.float32([0.5, np.nan]), "i": np.int8([1, 2])}
    pd.DataFrame(widths).to_parquet(tmp_path / "widths.parquet")
    alone = frames.read(str(tmp_path / "widths.parquet"))
    assert {name: alone[name].dtype for name in alone} == {n: v.dtype for n, v in widths.items()}


def test_columns_of_parquet_files_with_nothing_in_common_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1], "y": ["p"]}).to_parquet(tmp_path / "1.parquet")
    pd.DataFrame({"a": ["x"], "y": ["p"]}).to_parquet(tmp_path / "2.parquet")
    (tmp_path / "3.parquet").write_text("none")
    with pytest.raises(DataError, match="2.parquet: column 'a' is large_string, but in .* int64"):
        frames.read([str(tmp_path / "1.parquet"), str(tmp_path / "2.parquet")])
    with pytest.raises(DataError, match="3.parquet: cannot be read"):
        frames.read(str(tmp_path / "3.parquet"))


MEASURED = """
import sys, threading, time
from lepton_ray import data
from lepton_ray.config.schema import TableData
import pandas, pyarrow, sklearn.preprocessing, scipy.special  # what they take is not the file's
def used():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
before, seen, done = used(), [], threading.Event()
def look():
    while not done.is_set():
        seen.append(used())
        time.sleep(0.005)
looking = threading.Thread(target=look)
looking.start()
settings = TableData(kind="table", source=sys.argv[1], target="y", task="regression")
rows = len(data.load(settings).train)
done.set()
looking.join()
print(rows, max(seen) - before)
"""


def test_a_large_csv_takes_less_memory_than_its_size_and_a_half(tmp_path: Path) -> None:
    """So large that the blocks which are read at a time, of any file as large, are a part of it."""
    rng = np.random.default_rng(0)
    n = 200_000
    frame = pd.DataFrame({f"c{i}": rng.normal(0, 1, n) for i in range(15)})
    frame["y"] = rng.normal(0, 1, n)
    header, rows = frame.round(6).to_csv(index=False).split("\n", 1)
    path = tmp_path / "large.csv"
    path.write_text(f"{header}\n{rows * 8}")
    size = path.stat().st_size
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)],
        env={"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    read, most = map(int, done.stdout.split())
    assert read == 1_152_000
    assert most < 1.5 * size


def test_a_table_of_several_files_is_split_as_one(parts: Path) -> None:
    settings = TableData(kind="table", source=str(parts), target="y", drop=("c",))
    dataset = data.load(settings)
    assert sum(map(len, (dataset.train, dataset.validation, dataset.test))) == 120
