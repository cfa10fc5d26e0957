"""Bodies of /predict in every form, wrong ones, bombs, and whatever Hypothesis thinks of."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import struct
import time
import zlib
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lepton_ray.serving import tables
from lepton_ray.serving.bodies import ARROW, CSV, JSON, PARQUET
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import MAX_CATEGORY
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.sandbox import Sandbox
from tests import apps

ROWS = [{"age": 7.0, "city": "Rom"}, {"age": 8.5, "city": "Çorum"}, {"age": 1.0, "city": "x,\n"}]
FRAME = pd.DataFrame(ROWS)


@pytest.fixture(scope="module")
def table(people: Runtime) -> apps.App:
    return apps.app(people)


@pytest.fixture(scope="module")
def images(digits: Runtime) -> apps.App:
    return apps.app(digits)


def sent(app: apps.App, kind: str, body: bytes) -> Any:
    return app.post("/predict", content=body, headers={"content-type": kind})


def parquet(frame: pd.DataFrame | pa.Table, **options: Any) -> bytes:
    table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame)
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(frame: pd.DataFrame | pa.Table, **options: Any) -> bytes:
    table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame)
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)
    return out.getvalue()


def png(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False).encode()


# --- what is taken -------------------------------------------------------------------------------


def test_every_form_of_a_table_is_answered_alike(table: apps.App) -> None:
    expected = table.post("/predict", json={"rows": ROWS}).json()
    assert len(expected["predictions"]) == 3
    coded = pa.table({"age": FRAME.age, "city": pa.array(FRAME.city).dictionary_encode()})
    bodies = [
        (JSON, json.dumps({"rows": ROWS}).encode()),
        ("Application/JSON; charset=utf-8", json.dumps({"rows": ROWS}).encode()),
        (CSV, csv(FRAME)),
        (CSV + ";charset=utf-8", b"\xef\xbb\xbf" + csv(FRAME)),
        (CSV, csv(FRAME[["city", "age"]]).replace(b"\n", b"\r\n", 1) + b"\n\n"),
        *[(PARQUET, parquet(FRAME, compression=c)) for c in ("none", "snappy", "zstd", "gzip")],
        (PARQUET, parquet(coded)),
        (PARQUET, parquet(FRAME, row_group_size=1)),
        *[(ARROW, arrow(FRAME, compression=c)) for c in (None, "zstd", "lz4")],
        (ARROW, arrow(coded)),
    ]
    for kind, body in bodies:
        answer = sent(table, kind, body)
        assert answer.status_code == 200, (kind, answer.text)
        assert answer.json() == expected


def test_whole_numbers_of_a_file_are_numbers(table: apps.App) -> None:
    frame = FRAME.assign(age=[7, 8, 1])
    expected = table.post("/predict", json={"rows": frame.to_dict("records")}).json()
    for kind, body in ((PARQUET, parquet(frame)), (ARROW, arrow(frame)), (CSV, csv(frame))):
        assert sent(table, kind, body).json() == expected


@pytest.mark.parametrize("size", [8, 200, 5000])
def test_an_image_as_a_file_is_answered_as_its_pixels_are(images: apps.App, size: int) -> None:
    grey = np.random.default_rng(size).integers(0, 256, (8, 8), np.uint8)
    numbers = (grey.astype(np.float32) * np.float32(16 / 255)).tolist()
    expected = images.post("/predict", json={"rows": [{"image": numbers}]}).json()
    colour = np.repeat(grey[..., None], 3, axis=2)
    for body in (png(grey), png(colour)):
        assert sent(images, "image/png", body).json() == expected
        text = base64.b64encode(body).decode()
        assert images.post("/predict", json={"rows": [{"image": text}]}).json() == expected
    assert sent(images, "image/jpeg", png(grey, "JPEG")).status_code == 200


def test_top_k_are_the_likeliest_classes_in_order(images: apps.App) -> None:
    rows = {"rows": [{"image": [[float(i + j) for i in range(8)] for j in range(8)]}] * 2}
    (whole, _), cut = (
        images.post(f"/predict{query}", json=rows).json()["predictions"]
        for query in ("", "?top_k=3")
    )
    assert len(cut) == 2
    ranked = sorted(whole["probabilities"].items(), key=lambda item: -item[1])
    assert list(cut[0]["probabilities"].items()) == ranked[:3]
    assert cut[0]["label"] == whole["label"] == ranked[0][0]
    everything = images.post("/predict?top_k=99", json=rows).json()["predictions"][0]
    assert everything["probabilities"] == whole["probabilities"]


# --- what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "1.5", "", "9" * 5000])
def test_a_wrong_top_k_is_named(images: apps.App, top_k: str) -> None:
    answer = images.post(f"/predict?top_k={top_k}", json={"rows": [{"image": [[0] * 8] * 8}]})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("top_k: ")
    assert len(answer.text) < 400


def test_an_unknown_parameter_is_named(images: apps.App) -> None:
    answer = images.post("/predict?topk=3", json={"rows": [{"image": [[0] * 8] * 8}]})
    said = "no parameter 'topk', did you mean 'top_k'?"
    assert (answer.status_code, answer.json()) == (422, {"detail": said})
    assert images.get("/health?at=3").status_code == 200, "whatever keeps caches away"


def test_top_k_of_a_number_is_named(diabetes: Runtime) -> None:
    app = apps.app(diabetes)
    answer = app.post("/predict?top_k=2", json={"rows": [{}]})
    assert (answer.status_code, answer.json()["detail"][:22]) == (422, "top_k is for classes, ")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("image/png", 415),
        ("image/gif", 415),
        ("json", 415),
        ("é" * 100, 415),
        ("", 200),
    ],
)
def test_other_types_are_415_and_name_those_there_are(
    table: apps.App, kind: str, status: int
) -> None:
    body = json.dumps({"rows": ROWS}).encode()
    answer = table.post("/predict", content=body, headers={"content-type": kind.encode()})
    assert answer.status_code == status
    if status == 415:
        assert "application/json, text/csv, " in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/predict", "/v2/models/people/infer"])
def test_a_compressed_body_is_415_and_not_unpacked(table: apps.App, path: str) -> None:
    bomb = zlib.compress(b" " * (1 << 26), 9)
    for coding in ("gzip", "deflate", "br", "x"):
        answer = table.post(path, content=bomb, headers={"content-encoding": coding})
        assert answer.status_code == 415
        assert "uncompressed" in answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no columns"),
        (b"\n", "no columns"),
        (b"age,city\n", "at least one row"),
        (b"age,city\n1,Rom,3\n", "a line has 2 cells"),
        (b"age,city\n1,Rom\n2\n", "a line has 2 cells"),
        (b"age,city,zip\n1,Rom,3\n", "no such field; known: age, city"),
        (b"age,age,city\n1,1,Rom\n", "a column is named once"),
        (b"age,city" + b",age" * 100_000 + b"\n", "a column is named once"),
        (b"age\n1\n", "this field is required"),
        (b"age,city\nold,Rom\n", "must be a finite number"),
        (b"age,city\n,Rom\n", "must be a finite number"),
        (b"age,city\nnan,Rom\n", "must be a finite number"),
        (b"age,city\n1e999,Rom\n", "must be a finite number"),
        (b"age,city\n1_0,Rom\n", "must be a finite number"),
        (b'age,city\n1,"Rom\n', "must be CSV"),
        (b'age,city\n1,"R"om"\n', "must be CSV"),
        (b"age,city\n1,\xff\n", "must be CSV in UTF-8"),
        (b"age,city\n1," + b"a" * 200_000, "must be CSV"),
        (b"age,city\n1," + b"a" * 1001, f"must be a text of at most {MAX_CATEGORY} characters"),
    ],
)
def test_a_wrong_csv_is_422_and_named(table: apps.App, body: bytes, said: str) -> None:
    answer = sent(table, CSV, body)
    assert answer.status_code == 422
    assert said in answer.text


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (FRAME.assign(zip=3), "no such field; known: age, city"),
        (FRAME[["age"]], "this field is required"),
        (FRAME.assign(age=["7", "8", "9"]), "must be a finite number"),
        (FRAME.assign(age=[1, None, 3]), "must be a finite number"),
        (FRAME.assign(city=[1, 2, 3]), "must be a text"),
        (FRAME.assign(age=[[1], [2], [3]]), "a column holds numbers or texts"),
        (FRAME.assign(age=pd.Timestamp(0)), "a column holds numbers or texts"),
        (FRAME.assign(city=b"Rom"), "a column holds numbers or texts"),
        (FRAME[:0], "a"),
    ],
)
def test_a_wrong_file_of_a_table_is_422_and_named(
    table: apps.App, frame: pd.DataFrame, said: str
) -> None:
    for kind, write in ((PARQUET, parquet), (ARROW, arrow)):
        answer = sent(table, kind, write(frame))
        assert answer.status_code == 422, answer.text
        assert said in answer.text


@pytest.mark.parametrize("end", [13, 1 << 20, -1])
def test_an_offset_beyond_the_end_reads_nobody_s_memory(table: apps.App, end: int) -> None:
    offsets = struct.pack("<4q", 0, 3, 9, 12)
    body = arrow(FRAME)
    assert body.count(offsets) == 1
    answer = sent(table, ARROW, body.replace(offsets, struct.pack("<4q", 0, 3, 9, end)))
    assert answer.status_code == 422
    assert "the body must be an Arrow stream" in answer.text


def test_a_wrong_image_is_422_and_named(images: apps.App) -> None:
    grey = np.zeros((8, 8), np.uint8)
    for body, said in [
        (b"", "whole PNG or JPEG"),
        (png(grey)[:-30], "whole PNG or JPEG"),
        (png(grey, "GIF"), "whole PNG or JPEG"),
        (png(grey, "TIFF"), "whole PNG or JPEG"),
        (png(np.zeros((9, 8), np.uint8)), "must be 8 x 8 pixels: resize it"),
        (png(np.zeros((8, 8), np.uint16)), "8 bits a channel"),
    ]:
        answer = sent(images, "image/png", body)
        assert answer.status_code == 422, answer.text
        assert said in answer.json()["detail"][0]["rule"]
        text = base64.b64encode(body).decode()
        answer = images.post("/predict", json={"rows": [{"image": [[0] * 8] * 8}, {"image": text}]})
        assert answer.status_code == 422
        assert (answer.json()["detail"][0]["row"], answer.json()["detail"][0]["field"]) == (
            1,
            "image",
        )
    answer = images.post("/predict", json={"rows": [{"image": "n o"}]})
    assert "nested lists of shape [8, 8], or a file in base64" in answer.text


# --- too much ------------------------------------------------------------------------------------


def test_too_many_rows_are_413_in_every_form(people: Runtime) -> None:
    app = apps.app(people, rows=5)
    for n, status in ((5, 200), (6, 413)):
        frame = pd.DataFrame([ROWS[0]] * n)
        rows = json.dumps({"rows": frame.to_dict("records")}).encode()
        for kind, body in [
            (JSON, rows),
            (CSV, csv(frame)),
            (PARQUET, parquet(frame)),
            (ARROW, arrow(frame)),
        ]:
            assert sent(app, kind, body).status_code == status, kind
        inputs = [
            {"name": "age", "shape": [n], "datatype": "FP64", "data": [1.0] * n},
            {"name": "city", "shape": [n], "datatype": "BYTES", "data": ["Rom"] * n},
        ]
        answer = app.post("/v2/models/people/infer", json={"inputs": inputs})
        assert answer.status_code == status


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", ["/predict", "/v2/models/people/infer"])
def test_a_body_that_is_too_large_is_413_before_it_is_read(
    table: apps.App, path: str, declared: bool
) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1 << 20
            yield b" " * (1 << 20)

    headers = {"content-length": "99999999999999999999"} if declared else {}
    answer = table.post(path, content=endless(), headers=headers)
    assert answer.status_code == 413
    assert "at most 16777216 bytes" in answer.text
    assert read == (0 if declared else 17 << 20)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small bodies that unpack to a great deal."""
    long = "a" * (1 << 20)
    named = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), pa.array([long]))
    numbers = pa.array([1.0] * 9000)
    coded = pa.table({"age": numbers, "city": named})
    stored = pa.table({"age": [1.0] * 400, "city": [long] * 400})
    return {
        "an Arrow dictionary": (ARROW, arrow(coded, compression="zstd")),
        "a Parquet dictionary": (PARQUET, parquet(coded)),
        "Zstandard in Arrow": (ARROW, arrow(stored, compression="zstd")),
        "Zstandard in Parquet": (
            PARQUET,
            parquet(stored, compression="zstd", use_dictionary=False),
        ),
        "prefixes in Parquet": (
            PARQUET,
            parquet(
                stored,
                compression="zstd",
                use_dictionary=False,
                column_encoding={"city": "DELTA_BYTE_ARRAY", "age": "PLAIN"},
            ),
        ),
    }


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_the_next_is_answered(table: apps.App, name: str) -> None:
    kind, body = BOMBS[name]
    assert len(body) < 2_200_000
    answer = sent(table, kind, body)
    assert answer.status_code in (413, 422), answer.text
    assert "unpack" in answer.text
    assert sent(table, kind, parquet(FRAME) if kind == PARQUET else arrow(FRAME)).status_code == 200


def test_an_image_that_claims_to_be_huge_is_refused_by_its_head(images: apps.App) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        code = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + code

    head = chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * (1 << 24), 9))
    answer = sent(images, "image/png", b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b""))
    assert answer.status_code == 422
    rule = "an image has at most 67,108,864 pixels: make it smaller"
    assert answer.json()["detail"][0]["rule"] == rule


def test_many_small_images_that_are_large_together_are_413(digits: Runtime) -> None:
    app = apps.app(digits, decoded_mb=0.001)
    text = base64.b64encode(png(np.zeros((8, 8), np.uint8))).decode()
    for n, status in ((4, 200), (5, 413)):
        assert app.post("/predict", json={"rows": [{"image": text}] * n}).status_code == status


def test_a_long_text_does_not_make_every_row_long(table: apps.App, images: apps.App) -> None:
    """NumPy would give each of the others its room: here 40 and 2.6 GB."""
    rows = [{"age": 1, "city": "a" * 1_000_000}, *[{"age": 1, "city": "Rom"}] * 9_999]
    answer = table.post("/predict", json={"rows": rows})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["rule"] == "must be a text of at most 1000 characters"
    image = [["a" * 10_000_000, *[0] * 7], *[[0] * 8] * 7]
    answer = images.post("/predict", json={"rows": [{"image": image}]})
    assert answer.status_code == 422
    assert len(answer.text) < 1000


def test_an_answer_to_a_wrong_body_is_never_long(table: apps.App) -> None:
    for rows in (
        [{}] * 10_000,
        [{str(i): 1 for i in range(200_000)}],
        [{"a" * 1_000_000: "b" * 1_000_000}] * 5,
        ["a" * 10_000] * 500,
    ):
        answer = table.post("/predict", json={"rows": rows})
        assert answer.status_code == 422
        assert len(answer.content) < 20_000


def test_a_crash_or_too_much_memory_ends_one_file(people: Runtime) -> None:
    sandbox = Sandbox(1 << 30)
    body = parquet(FRAME)

    async def ask() -> None:
        for function, args in ((os.abort, ()), (bytearray, (1 << 34,))):
            with pytest.raises((RefusedError, MemoryError)):
                await sandbox.run(function, *args)
            rows = await sandbox.run(tables.from_parquet, people.schema, body, 9, 1 << 20)
            assert rows == ROWS

    asyncio.run(ask())
    sandbox.close()


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.5])
def test_a_file_that_is_left_does_not_answer_the_next(after_s: float) -> None:
    sandbox = Sandbox(1 << 30)

    async def ask() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(after_s):
                await sandbox.run(time.sleep, 60)
        assert await sandbox.run(str.upper, "next") == "NEXT"
        return await sandbox.run(str.upper, "again")

    assert asyncio.run(ask()) == "AGAIN"
    sandbox.close()


# --- whatever else -------------------------------------------------------------------------------

FEW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20)
    | st.sampled_from([10**400, -0.0, 1e308, "\ud800", "\0", "Rom", "age", [[0] * 8] * 8]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["age", "city", "image", "rows", "\ud800"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
VALID = {
    JSON: json.dumps({"rows": ROWS}).encode(),
    CSV: csv(FRAME),
    PARQUET: parquet(FRAME),
    ARROW: arrow(FRAME, compression="zstd"),
    "image/png": png(np.zeros((8, 8), np.uint8)),
    "image/jpeg": png(np.zeros((8, 8), np.uint8), "JPEG"),
}


def checked(app: apps.App, path: str, **options: Any) -> None:
    answer = app.post(path, **options)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.status_code in (404, 413, 415, 422)
        key = "error" if path.startswith("/v2") else "detail"
        assert list(answer.json()) == [key]
        assert answer.json()[key]
        assert "Traceback" not in answer.text
        assert ".py" not in answer.text


@FEW
@given(rows=VALUES | st.lists(VALUES, max_size=3))
def test_any_rows_of_json(table: apps.App, images: apps.App, rows: Any) -> None:
    for app in (table, images):
        checked(app, "/predict", content=json.dumps({"rows": rows}))
        row = {"age": rows, "city": rows} if app is table else {"image": rows}
        checked(app, "/predict", content=json.dumps({"rows": [row]}))


@FEW
@given(kind=st.sampled_from(sorted(VALID)), body=st.binary(max_size=200))
def test_any_bytes(table: apps.App, images: apps.App, kind: str, body: bytes) -> None:
    for app in (table, images):
        checked(app, "/predict", content=body, headers={"content-type": kind})


@settings(FEW, max_examples=200)
@given(kind=st.sampled_from(sorted(VALID)), data=st.data())
def test_any_damage_to_a_file(
    table: apps.App, images: apps.App, kind: str, data: st.DataObject
) -> None:
    body = bytearray(VALID[kind])
    where = st.integers(0, len(body) - 1)
    for at, byte in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=4)):
        body[at] = byte
    end = data.draw(where | st.just(len(body)))
    app = images if kind.startswith("image") else table
    checked(app, "/predict", content=bytes(body[:end]), headers={"content-type": kind})


TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["age", "city"]) | VALUES,
        "shape": st.sampled_from([[1], [2], [1, 1], [0], [1 << 50], [1 << 39] * 3]) | VALUES,
        "datatype": st.sampled_from(["FP64", "BYTES", "INT8", "BOOL", "FP16"]) | VALUES,
        "data": st.sampled_from([[1.0], ["Rom"], [[1]], [True, 2]]) | VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 9)}) | VALUES,
    },
)


@settings(FEW, max_examples=200)
@given(
    inputs=st.lists(TENSOR, max_size=3) | VALUES,
    more=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), VALUES, max_size=2),
    behind=st.binary(max_size=12),
    length=st.none() | st.integers(-1, 300),
)
def test_any_tensors(table: apps.App, inputs: Any, more: dict, behind: bytes, length: Any) -> None:
    head = json.dumps({"inputs": inputs, **more}).encode()
    headers = {"inference-header-content-length": str(len(head) if length is None else length)}
    checked(table, "/v2/models/people/infer", content=head + behind, headers=headers)
