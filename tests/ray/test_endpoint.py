"""A version in the registry, and its endpoint over real HTTP."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from ray import serve
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from lepton_ray import data, models
from lepton_ray.config.schema import Limits, Model, Serve, TableData
from lepton_ray.data import Dataset
from lepton_ray.errors import ModelError, ServingError
from lepton_ray.serving import endpoint, package
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving.app import application
from lepton_ray.serving.followers import start, stop
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import Runtime
from lepton_ray.tracking import registry
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register


@pytest.fixture(scope="module")
def registered(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An untrained version, as ``small@champion``."""
    root = tmp_path_factory.mktemp("registry")
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = stores.new(root)
    small = experiment()
    model = models.build(small.model, dataset.preprocess.input_shape, 10)
    version = register(small, dataset, model, root)
    registry.promote(version, instead_of=None)
    yield "small@champion"
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def rows(dataset: Dataset) -> list[dict]:
    return package.rows(dataset.schema, dataset.test_columns, 100)


@pytest.fixture(scope="module")
def live(cluster: None, registered: str, port: int) -> Iterator[endpoint.Live]:
    with endpoint.serving(registered, Serve(port=port)) as live:
        yield live


@pytest.fixture(scope="module")
def url(live: endpoint.Live) -> str:
    return live.url


def test_http_answers_are_those_of_load_model_bit_for_bit(
    live: endpoint.Live, registered: str, rows: list[dict]
) -> None:
    expected = [a.model_dump() for a in load_model(registered).predict(rows)]
    parts = [slice(0, 1), slice(1, 4), slice(4, 30), slice(30, 31), slice(31, 95), slice(95, 100)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda part: live.client().predict(rows[part]), parts * 4))
    for part, answer in zip(parts * 4, answers, strict=True):
        assert answer["predictions"] == expected[part]
        assert (answer["model"], answer["version"]) == ("small", 1)


def test_more_rows_than_a_batch_holds_are_answered_by_one_version(
    live: endpoint.Live, registered: str, rows: list[dict]
) -> None:
    sent = rows * 3
    assert len(sent) > Serve().batch.largest * 4
    expected = [a.model_dump() for a in load_model(registered).predict(sent)]
    with live.client() as client:
        assert client.predict(sent)["predictions"] == expected


def test_triton_s_client_over_http(url: str, registered: str, rows: list[dict]) -> None:
    x = np.array([row["image"] for row in rows], np.float32)
    given = InferInput("image", list(x.shape), "FP32")
    given.set_data_from_numpy(x)
    with InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small", "1")
        assert not client.is_model_ready("small", "2")
        assert client.get_server_metadata()["name"] == "lepton_ray"
        assert client.get_model_metadata("small")["inputs"][0]["shape"] == [-1, 8, 8]
        result = client.infer("small", [given], model_version="1", request_id="7")
        with pytest.raises(InferenceServerException, match="no such output 'tag'"):
            client.infer("small", [given], outputs=[InferRequestedOutput("tag")])
    expected = load_model(registered).predict(rows)
    assert [text.decode() for text in result.as_numpy("label")] == [a.label for a in expected]
    np.testing.assert_array_equal(
        result.as_numpy("probabilities"),
        np.array([list(a.probabilities.values()) for a in expected], np.float32),
    )


def test_a_request_id_goes_back_once(url: str) -> None:
    answer = httpx.get(f"{url}/health", headers={"x-request-id": "r-7"})
    assert answer.headers.get_list("x-request-id") == ["r-7"]
    assert len(httpx.get(f"{url}/health").headers.get_list("x-request-id")) == 1


def test_health_and_openapi(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "small", "version": 1}
    body = httpx.get(f"{url}/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]
    row = body["content"]["application/json"]["schema"]["properties"]["rows"]["items"]
    assert row["required"] == ["image"]
    numbers, file = row["properties"]["image"]["anyOf"]
    assert (numbers["maxItems"], file["contentEncoding"]) == (8, "base64")
    assert httpx.get(f"{url}/docs").status_code == 200


@pytest.mark.parametrize(
    ("row", "field", "rule"),
    [
        ({}, "image", "this field is required"),
        ({"image": [[1, 2]]}, "image", "nested lists of shape [8, 8]"),
        ({"image": "a"}, "image", "nested lists of shape [8, 8]"),
        ({"image": [[17.0] * 8] * 8}, "image", "lie between 0 and 16"),
        ({"image": [[0.0] * 8] * 8, "label": 3}, "label", "no such field; known: image"),
        (7, "", "a row is an object with the fields image"),
    ],
)
def test_wrong_rows_are_422_with_field_rule_and_value(
    url: str, rows: list[dict], row: object, field: str, rule: str
) -> None:
    response = httpx.post(f"{url}/predict", json={"rows": [rows[0], row]})
    assert response.status_code == 422
    (problem,) = response.json()["detail"]
    assert (problem["row"], problem["field"]) == (1, field)
    assert rule in problem["rule"]
    assert problem["value"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"rows": []}', b'{"rows": [1], "x": 2}', b"\xff", b"[" * 100_000],
    ids=lambda body: body[:8],
)
def test_wrong_bodies_are_422(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/predict", content=body)
    assert response.status_code == 422
    assert "body" in response.json()["detail"] or "rows" in response.json()["detail"]


def test_rows_of_a_table_and_numbers_that_are_too_large(
    url: str, registered: str, tmp_path: Path
) -> None:
    n = 300
    frame = pd.DataFrame({"age": np.arange(n), "city": ["Bonn", "Rom"] * (n // 2)})
    frame.assign(y=frame.age > n // 2).to_csv(tmp_path / "people.csv", index=False)
    table = data.load(TableData(kind="table", source=str(tmp_path / "people.csv"), target="y"))
    model = models.build(Model(name="mlp", width=8), table.preprocess.input_shape, 2)
    register(experiment(name="people"), table, model, tmp_path)
    runtime = load_model("people/1")
    config = Serve(batch={"max": 64, "wait_ms": 50})
    follower, _ = start("people/1", "people", url, None)
    serve.run(
        application(follower, "people", config),
        name="people",
        route_prefix="/people",
    )
    good = [{"age": 7, "city": "Rom"}, {"age": 7.5, "city": "Atlantis"}]
    sent = [good, [*good, {"age": 1e300, "city": "Rom"}], [{"age": 10**400, "city": "Rom"}]] * 4
    parquet = io.BytesIO()
    pd.DataFrame(good).to_parquet(parquet)
    kind = {"content-type": "application/vnd.apache.parquet"}
    try:
        of_file = httpx.post(f"{url}/people/predict", content=parquet.getvalue(), headers=kind)
        metrics = httpx.get(f"{url}/people/metrics")
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(lambda r: httpx.post(f"{url}/people/predict", json={"rows": r}), sent)
            )
    finally:
        serve.delete("people")
        stop("people")
    assert [a.status_code for a in answers] == [200, 422, 422] * 4
    expected = [a.model_dump() for a in runtime.predict(good)]
    assert of_file.json()["predictions"] == expected
    assert metrics.status_code == 200
    for of_good, no_answer, no_number in zip(*[iter(answers)] * 3, strict=True):
        assert of_good.json()["predictions"] == expected, "whoever else is in the batch"
        assert "no finite answer" in no_answer.json()["detail"][0]["rule"]
        assert no_answer.json()["detail"][0]["row"] == 2
        assert no_number.json()["detail"][0]["rule"] == "must be a finite number"


def test_a_body_that_is_too_large_is_413(url: str) -> None:
    response = httpx.post(f"{url}/predict", content=b"x" * (int(Limits().body_mb * 2**20) + 1))
    assert response.status_code == 413
    assert httpx.get(f"{url}/health").status_code == 200


def test_the_curl_line_is_one_command_with_the_row(live: endpoint.Live, rows: list[dict]) -> None:
    words = shlex.split(endpoint.curl(live, rows[0]))
    assert words[:3] == ["curl", "-s", f"{live.url}/predict"]
    assert json.loads(words[-1]) == {"rows": [rows[0]]}


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {number} .*--set serve.port={number + 1}"):
            endpoint.check_port("127.0.0.1", number)


def test_serve_listens_on_one_port_of_a_cluster(url: str, registered: str, port: int) -> None:
    other = Serve(port=port - 1)
    said = f"listens at 127.0.0.1:{port} already, and cannot at 127.0.0.1:{port - 1}"
    with pytest.raises(ServingError, match=said), endpoint.serving(registered, other):
        pass
    assert httpx.get(f"{url}/health").status_code == 200


def test_mlflow_itself_reads_the_version_without_pickle(
    registered: str, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    loaded = mlflow.pyfunc.load_model(f"models:/{registered}")
    frame = loaded.predict(pd.DataFrame(rows[:5]))
    expected = load_model(registered).predict(rows[:5])
    assert frame["label"].tolist() == [a.label for a in expected]
    assert frame["probability_3"].tolist() == [a.probabilities["3"] for a in expected]


def test_nothing_in_a_version_is_a_pickle(registered: str) -> None:
    folder = registry.resolve(registered).folder()
    names = {p.name for p in folder.parents[1].rglob("*") if p.is_file()}
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    assert {"model.pt2", "model.onnx", "preprocess.safetensors", "manifest.json"} <= names


def test_a_changed_file_and_a_newer_format_are_refused(registered: str, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "v"
    shutil.copytree(registry.resolve(registered).folder(), folder)
    Runtime.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    newer = manifests.FORMAT + 1
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": newer}))
    with pytest.raises(ModelError, match=f"has format {newer}.*reads up to {manifests.FORMAT}"):
        Runtime.load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    onnx = bytearray((folder / "model.onnx").read_bytes())
    onnx[-1] ^= 1
    (folder / "model.onnx").write_bytes(onnx)
    with pytest.raises(ModelError, match="model.onnx was changed"):
        Runtime.load(folder)


def test_the_runtime_answers_alike_at_any_batch_size(registered: str, dataset: Dataset) -> None:
    runtime = load_model(registered)
    assert runtime.manifest["parity"]["batch_invariant"]
    columns = {"image": dataset.test_columns["image"][:64]}
    whole = runtime.predict_columns(columns)
    alone = [runtime.forward({"image": columns["image"][i : i + 1]}) for i in range(64)]
    np.testing.assert_array_equal(np.concatenate(alone), whole)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("small", "NAME@ALIAS or NAME/VERSION"),
        ("smal@champion", r"registered are: (.*, )?small\b"),
        ("small@none", "aliases: champion -> 1"),
        ("small/9", "aliases: champion -> 1"),
    ],
)
def test_unknown_references_say_what_there_is(registered: str, reference: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        registry.resolve(reference)
