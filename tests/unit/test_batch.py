"""Files of any size to files of answers, without Ray."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lepton_ray.errors import DataError, InputError
from lepton_ray.pipeline import batch
from lepton_ray.serving import blocks
from lepton_ray.serving.requests import RowsError
from lepton_ray.serving.runtime import Runtime
from tests import apps
from tests.terminal import Lines

Predict = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder_of_people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    apps.people(folder)
    return folder / "v"


@pytest.fixture(scope="module")
def people(folder_of_people: Path) -> Runtime:
    return Runtime.load(folder_of_people, name="people", version=3)


@pytest.fixture
def predict(people: Runtime, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Of people; in parts of 7 rows."""
    monkeypatch.setattr(batch, "load_model", lambda reference: people)
    monkeypatch.setattr(batch, "ALONE", 1000)
    monkeypatch.setattr(blocks, "ROWS", 7)
    monkeypatch.setattr(blocks, "CHUNK", 3)

    def call(*paths: Path, output: Path | None, **options: Any) -> dict[str, Any]:
        given = [str(p) for p in paths]
        out = str(output) if output else None
        options.setdefault("terminal", Lines())
        return batch.predict("people/3", given, output=out, **options)

    return call


NASTY = ["Bonn", 'say "hi"', "two\nlines", "a,b", "", "NA", "Çorum", "1e5", "'"]


def rows(n: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"id": f"n{i}", "age": rng.choice([i, i / 3, -1e-7, 12345.678]), "city": rng.choice(NASTY)}
        for i in range(n)
    ]


def written(path: Path, given: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in given))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(given[0]))
            writer.writeheader()
            writer.writerows(given)
    else:
        table = pa.Table.from_pylist([{**row, "age": float(row["age"])} for row in given])
        pq.write_table(table, path, row_group_size=17)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of an output as JSON's answers, with what was kept."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(path.read_text())))
    else:
        found = pq.read_table(path).to_pylist()
    return [
        {
            **{k: v for k, v in row.items() if not k.startswith("probability_")},
            "probabilities": {
                k.removeprefix("probability_"): float(v)
                for k, v in row.items()
                if k.startswith("probability_")
            },
        }
        for row in found
    ]


@pytest.mark.parametrize("out", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("into", [".jsonl", ".csv", ".parquet"])
def test_a_file_is_answered_as_http_answers_its_rows(
    predict: Predict, people: Runtime, tmp_path: Path, into: str, out: str
) -> None:
    given = rows(40)
    source = written(tmp_path / f"rows{into}", given)
    output = tmp_path / f"out{out}"
    done = predict(source, output=output, keep=["id"])
    assert (done["rows"], done["parts"] >= 6) == (40, True)
    sent = [{"age": row["age"], "city": row["city"]} for row in given]
    answer = apps.app(people).post("/predict", json={"rows": sent}).json()["predictions"]
    expected = [{"id": row["id"], **a} for row, a in zip(given, answer, strict=True)]
    assert read(output) == expected
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == [output.name]


def test_standard_output_and_a_folder_of_files(
    predict: Predict, people: Runtime, tmp_path: Path
) -> None:
    given = rows(20)
    written(tmp_path / "a.csv", given[:9])
    written(tmp_path / "b.parquet", given[9:])
    terminal = Lines()
    done = predict(tmp_path, output=None, terminal=terminal)
    assert done == {"rows": 20, "output": None}
    sent = [{"age": row["age"], "city": row["city"]} for row in given]
    assert [json.loads(line) for line in terminal.said] == [
        a.model_dump() for a in people.predict(sent)
    ]


def test_a_call_that_ended_goes_on(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "rows.csv", rows(40))
    output = tmp_path / "out.csv"
    predict(source, output=output)
    whole = output.read_text()
    output.unlink()

    real, done = batch._Work.do, []

    def ends(self: Any, runtime: Any, number: int) -> int:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return real(self, runtime, number)

    monkeypatch.setattr(batch._Work, "do", ends)
    with pytest.raises(KeyboardInterrupt):
        predict(source, output=output)
    assert not output.exists()

    again = []
    monkeypatch.setattr(batch._Work, "do", lambda self, r, n: again.append(n) or real(self, r, n))
    terminal = Lines()
    assert predict(source, output=output, terminal=terminal)["done_before"] == 3
    assert (again, terminal.said[0]) == ([3, 4, 5], "predict goes on after 3 of 6 parts")
    assert output.read_text() == whole
    assert not Path(f"{output}.parts").exists()


KILLED = """
import os, signal, sys
from lepton_ray import storage
from lepton_ray.pipeline import batch
from lepton_ray.serving import blocks
from lepton_ray.serving.runtime import Runtime
from lepton_ray.terminal import Silent
from pathlib import Path

model, source, output, most = sys.argv[1:]
blocks.ROWS, batch.ALONE = 7, 1000
batch.load_model = lambda reference: Runtime.load(Path(model), name="people", version=3)
replace = os.replace


def dies(aside, path):
    if path.endswith(most):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(aside, path)


os.replace = dies
batch.predict("people/3", [source], output=output, terminal=Silent())
"""


@pytest.mark.parametrize("most", ["part-000003", "out.csv"])
def test_kill_9_loses_no_part(
    predict: Predict, folder_of_people: Path, tmp_path: Path, most: str
) -> None:
    """In the middle of a part, and of the whole."""
    source = written(tmp_path / "rows.csv", rows(40))
    output = tmp_path / "out.csv"
    model = str(folder_of_people)
    arguments = [sys.executable, "-c", KILLED, model, str(source), str(output), most]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not output.exists()
    done = predict(source, output=output)
    assert done["done_before"] == {"part-000003": 3, "out.csv": 6}[most]
    expected = tmp_path / "expected.csv"
    predict(source, output=expected)
    assert output.read_text() == expected.read_text()
    assert not Path(f"{output}.parts").exists()


def test_parts_of_another_input_are_not_used(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "rows.csv", rows(40))
    output = tmp_path / "out.csv"
    with monkeypatch.context() as broken:
        broken.setattr(batch._Parts, "join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(source, output=output)
    written(source, rows(41)[1:])
    terminal = Lines()
    assert predict(source, output=output, terminal=terminal)["done_before"] == 0
    assert "starts anew" in terminal.said[0]
    expected = tmp_path / "expected.csv"
    predict(source, output=expected)
    assert output.read_text() == expected.read_text()


def test_a_second_process_at_the_same_output_is_told(predict: Predict, tmp_path: Path) -> None:
    source = written(tmp_path / "rows.csv", rows(4))
    output = tmp_path / "out.csv"
    folder = Path(f"{output}.parts")
    folder.mkdir()
    with (
        batch._alone(str(folder), folder),
        pytest.raises(InputError, match="another process is writing"),
    ):
        predict(source, output=output)


def test_what_does_not_fit_is_told_with_its_row_and_nothing_is_written(
    predict: Predict, tmp_path: Path
) -> None:
    given = rows(40)
    given[33]["age"] = "old"
    source = written(tmp_path / "rows.csv", given)
    output = tmp_path / "out.csv"
    with pytest.raises(RowsError, match="row 33, field 'age': must be a finite number"):
        predict(source, output=output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"age,city\n1,Rom\n2\n", "row 1 must have 2 cells, as the header has, but has 1"),
        ("a.csv", b"age,age\n1,2\n", "'age' is there twice"),
        ("a.csv", b"age,city\n1,\xe4\n", "must be in UTF-8, but has byte 0xe4"),
        ("a.csv", b'age,city\n1,"Rom\n', "cannot be read: unexpected end of data"),
        ("a.jsonl", b'{"age": 1, "city": "Rom"}\n{"age": \n', "row 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "row 0 must be an object"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.csv", b"name,city\n1,Rom\n", "row 0, field 'age': this field is required"),
        ("a.xlsx", b"", "must end with .csv, .parquet, .jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    predict: Predict, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        predict(tmp_path / name, output=tmp_path / "out.csv")


def test_wrong_outputs_and_columns_are_told_before_anything(
    predict: Predict, tmp_path: Path
) -> None:
    source = written(tmp_path / "rows.csv", rows(4))
    for output, keep, said in [
        ("out.txt", [], "must end with .jsonl, .csv, .parquet"),
        ("no/out.csv", [], "its folder does not exist"),
        ("out.csv", ["ids"], "no column 'ids' to keep, did you mean 'id'"),
    ]:
        with pytest.raises(InputError, match=said):
            predict(source, output=tmp_path / output, keep=keep)
    labelled = written(tmp_path / "l.csv", [{**row, "label": "x"} for row in rows(4)])
    with pytest.raises(InputError, match="an answer has 'label' of its own"):
        predict(labelled, output=tmp_path / "out.csv", keep=["label"])
    with pytest.raises(DataError, match="'none.csv' does not exist"):
        batch.predict("people/3", ["none.csv"], output=None, terminal=Lines())


def test_the_input_is_not_written_over(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("age,city\n7,Rom\n")
    with pytest.raises(InputError, match="would take the place of its input"):
        predict(source, output=source)
    with pytest.raises(InputError, match="or be read with it the next time"):
        predict(tmp_path, output=tmp_path / "out.csv")
    assert source.read_text() == "age,city\n7,Rom\n"


def test_an_empty_file_gives_an_empty_file(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,city\n")
    assert predict(tmp_path / "a.csv", output=tmp_path / "out.csv")["rows"] == 0
    assert (tmp_path / "out.csv").read_text() == "label,probability_no,probability_yes\n"
    assert predict(tmp_path / "a.csv", output=tmp_path / "out.parquet")["rows"] == 0
    assert pq.read_table(tmp_path / "out.parquet").column_names[0] == "label"


def test_memory_does_not_grow_with_the_file(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROWS", 200)
    monkeypatch.setattr(blocks, "CHUNK", 50)
    peaks = []
    for n in (400, 4000):
        source = written(tmp_path / "rows.jsonl", [{"age": 1, "city": "x" * 900}] * n)
        tracemalloc.start()
        predict(source, output=tmp_path / "out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_pictures_in_rows_may_be_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digits = apps.digits(tmp_path)
    monkeypatch.setattr(batch, "load_model", lambda reference: digits)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    source = tmp_path / "rows.jsonl"
    text = base64.b64encode(file.getvalue()).decode()
    listed = (pixels * (16 / 255)).tolist()
    source.write_text(f"{json.dumps({'image': text})}\n{json.dumps({'image': listed})}\n")
    output = tmp_path / "out.jsonl"
    batch.predict("digits/3", [str(source)], output=str(output), terminal=Lines())
    first, second = read(output)
    answer = apps.app(digits).post("/predict", json={"rows": [{"image": text}]}).json()
    assert [first] == answer["predictions"]
    assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)
    binary = pd.DataFrame({"image": [file.getvalue()]})
    binary.to_parquet(tmp_path / "rows.parquet")
    batch.predict(
        "digits/3", [str(tmp_path / "rows.parquet")], output=str(output), terminal=Lines()
    )
    assert read(output) == [first]
