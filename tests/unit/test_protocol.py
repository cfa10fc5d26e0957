"""The Open Inference Protocol: its own examples by hand, and an independent client's bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from lepton_ray.serving.runtime import Runtime
from tests import apps

AGE = {"name": "age", "shape": [2], "datatype": "FP64", "data": [7, 8.5]}
CITY = {"name": "city", "shape": [2], "datatype": "BYTES", "data": ["Rom", "Çorum"]}
ROWS = [{"age": 7, "city": "Rom"}, {"age": 8.5, "city": "Çorum"}]
INFER = "/v2/models/people/infer"


@pytest.fixture
def app(people: Runtime) -> apps.App:
    return apps.app(people)


def by_predict(app: apps.App, rows: list[dict]) -> list[dict]:
    return app.post("/predict", json={"rows": rows}).json()["predictions"]


# --- by hand -------------------------------------------------------------------------------------


def test_health_and_metadata(app: apps.App) -> None:
    assert app.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert app.get(path).status_code == 200
    told = app.get("/v2/models/people").json()
    assert told == app.get("/v2/models/people/versions/3").json()
    assert told["versions"] == ["3"]
    assert told["inputs"] == [
        {"name": "age", "datatype": "FP64", "shape": [-1]},
        {"name": "city", "datatype": "BYTES", "shape": [-1]},
    ]
    label, probabilities = told["outputs"]
    assert label == {"name": "label", "datatype": "BYTES", "shape": [-1]}
    assert (probabilities["datatype"], probabilities["shape"]) == ("FP32", [-1, 2])
    assert json.loads(probabilities["parameters"]["classes"]) == ["no", "yes"]
    for path in ("/v2/models/people/ready", "/v2/models/people/versions/3/ready"):
        assert app.get(path).json() == {"name": "people", "ready": True}


@pytest.mark.parametrize("path", ["/v2/models/rome", "/v2/models/people/versions/4"])
def test_what_is_not_served_is_404_with_what_is(app: apps.App, path: str) -> None:
    for answer in (
        app.get(path),
        app.get(f"{path}/ready"),
        app.post(f"{path}/infer", json={"inputs": [AGE, CITY]}),
    ):
        assert answer.status_code == 404
        assert "served is 'people' version 3" in answer.json()["error"]


@pytest.mark.parametrize("path", [INFER, "/v2/models/people/versions/3/infer"])
def test_tensors_in_json_are_answered_as_rows_are(app: apps.App, path: str) -> None:
    answer = app.post(path, json={"id": "42", "inputs": [CITY, AGE]})
    assert answer.status_code == 200
    told = answer.json()
    assert (told["id"], told["model_name"], told["model_version"]) == ("42", "people", "3")
    label, probabilities = told["outputs"]
    expected = by_predict(app, ROWS)
    assert (label["datatype"], label["shape"]) == ("BYTES", [2])
    assert label["data"] == [e["label"] for e in expected]
    assert (probabilities["datatype"], probabilities["shape"]) == ("FP32", [2, 2])
    assert probabilities["data"] == [p for e in expected for p in e["probabilities"].values()]
    assert app.lines[0]["rows"] == 2


def test_a_column_may_come_as_a_column_and_in_any_type_of_number(app: apps.App) -> None:
    expected = app.post(INFER, json={"inputs": [{**AGE, "data": [7, 8]}, CITY]}).json()
    for datatype in ("UINT8", "INT64", "FP16", "FP32"):
        age = {"name": "age", "shape": [2, 1], "datatype": datatype, "data": [[7], [8]]}
        city = {**CITY, "shape": [2, 1]}
        assert app.post(INFER, json={"inputs": [age, city]}).json() == expected


def test_one_output_of_several(app: apps.App) -> None:
    wanted = {"inputs": [AGE, CITY], "outputs": [{"name": "label"}]}
    assert [o["name"] for o in app.post(INFER, json=wanted).json()["outputs"]] == ["label"]


def test_binary_tensors_by_hand(app: apps.App) -> None:
    """Laid out byte for byte as the extension says."""
    ages = struct.pack("<2d", 7.0, 8.5)
    cities = b"\3\0\0\0Rom" + b"\6\0\0\0\xc3\x87orum"
    inputs = [
        {"name": "age", "shape": [2], "datatype": "FP64", "parameters": {"binary_data_size": 16}},
        {"name": "city", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 17}},
    ]
    outputs = [
        {"name": "probabilities", "parameters": {"binary_data": True}},
        {"name": "label", "parameters": {"binary_data": False}},
    ]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    answer = app.post(
        INFER,
        content=head + ages + cities,
        headers={"inference-header-content-length": str(len(head))},
    )
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["inference-header-content-length"])
    label, probabilities = json.loads(answer.content[:length])["outputs"]
    assert label["data"] == [e["label"] for e in by_predict(app, ROWS)]
    assert probabilities["parameters"] == {"binary_data_size": 16}
    given = struct.unpack("<4f", answer.content[length:])
    assert list(given) == [p for e in by_predict(app, ROWS) for p in e["probabilities"].values()]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([AGE], "field 'city': this field is required"),
        ([AGE, CITY, {**AGE, "name": "zip"}], "field 'zip': no such field; known: age, city"),
        ([AGE, CITY, AGE], "input 'age' is given twice"),
        ([AGE, {**CITY, "shape": [1], "data": ["Rom"]}], "must have as many rows each"),
        ([{**AGE, "data": [7]}, CITY], "input 'age': its shape holds 2 values, but data 1"),
        ([{**AGE, "data": [[7], [8, 9]]}, CITY], "holds 2 values, but data 3"),
        ([{**AGE, "data": [7, "8"]}, CITY], "input 'age': data must be of FP64"),
        ([{**AGE, "data": [7, True]}, CITY], "input 'age': data must be of FP64"),
        ([{**AGE, "data": [7, None]}, CITY], "input 'age': data must be of FP64"),
        ([{**AGE, "data": [7, [8]]}, CITY], "input 'age': data must be of FP64"),
        ([{**AGE, "data": 7}, CITY], "input 'age': data must be a list"),
        ([{**AGE, "datatype": "INT8", "data": [1, 300]}, CITY], "a value is beyond INT8"),
        ([{**AGE, "datatype": "INT8", "data": [1, 1.5]}, CITY], "data must be of INT8"),
        ([{**AGE, "datatype": "FP16", "data": [1, 1e9]}, CITY], "must be a finite number"),
        ([{**AGE, "data": [7, 10**400]}, CITY], "a value is beyond FP64"),
        ([{**AGE, "data": [7, float("nan")]}, CITY], "row 1, field 'age': must be a finite number"),
        ([{**AGE, "datatype": "FP8"}, CITY], "datatype must be one of BYTES, BOOL"),
        ([{**AGE, "datatype": []}, CITY], "datatype must be one of BYTES, BOOL"),
        ([{**AGE, "datatype": "BYTES", "data": ["7", "8"]}, CITY], "must be a finite number"),
        ([AGE, {**CITY, "datatype": "FP64", "data": [1, 2]}], "field 'city': must be a text"),
        ([{**AGE, "shape": [-1]}, CITY], "shape must be 1 to 8 whole numbers"),
        ([{**AGE, "shape": [2, 1.0]}, CITY], "shape must be 1 to 8 whole numbers"),
        ([{**AGE, "shape": [True]}, CITY], "shape must be 1 to 8 whole numbers"),
        ([{**AGE, "shape": []}, CITY], "shape must be 1 to 8 whole numbers"),
        ([{**AGE, "shape": [2, 2], "data": [1, 2, 3, 4]}, CITY], "must be a finite number"),
        ([{**AGE, "shape": [0], "data": []}, {**CITY, "shape": [0], "data": []}], "at least one"),
        ([{**AGE, "shape": [2, 0], "data": []}, CITY], "must be a finite number"),
        ([{**AGE, "shape": [20000, 0], "data": []}], "at most 10000 rows"),
        ([{**AGE, "shape": [0, 1 << 39, 1 << 39], "data": []}], "numbers that a body can hold"),
        ([{**AGE, "parameters": 3}, CITY], "parameters must be an object"),
        ([{**AGE, "parameters": {"binary_data_size": 16}}, CITY], "not both"),
        ([7], "inputs[0] must be an object"),
        ([{}], "inputs[0].name must be a string"),
        ([], "inputs must list at least one tensor"),
        (None, "inputs must list at least one tensor"),
    ],
)
def test_wrong_tensors_are_named(app: apps.App, inputs: Any, said: str) -> None:
    answer = app.post(INFER, content=json.dumps({"inputs": inputs}))
    assert answer.status_code in (413, 422)
    assert list(answer.json()) == ["error"]
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"id": 3}, "id must be a string"),
        ({"outputs": [{"name": "tag"}]}, "no such output 'tag'; known: label, probabilities"),
        ({"outputs": [3]}, "outputs[0] must be an object with a name"),
        ({"outputs": {}}, "outputs must be a list"),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "true or false"),
    ],
)
def test_wrong_requests_are_named(app: apps.App, more: dict, said: str) -> None:
    answer = app.post(INFER, json={"inputs": [AGE, CITY], **more})
    assert answer.status_code == 422
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("datatype", "size", "data", "said"),
    [
        ("FP64", 8, b"12345678", "2 values of FP64 take 16 bytes, but binary_data_size is 8"),
        ("FP64", 17, b"1" * 16, "binary_data_size is 17, but 16 bytes are left"),
        ("FP64", -1, b"", "binary_data_size is -1"),
        ("FP64", 16.0, b"1" * 16, "binary_data_size is 16.0"),
        ("FP64", 16, b"1" * 20, "4 bytes behind the last tensor belong to none"),
        ("FP64", 16, b"\xff" * 16, "must be a finite number"),
        ("BYTES", 3, b"\1\0\0", "a length is cut off"),
        ("BYTES", 6, b"\xff\xff\xff\xff12", "a text of 4294967295 bytes is cut off"),
        ("BYTES", 5, b"\1\0\0\0\xff", "a text must be UTF-8"),
        ("BYTES", 4, b"\0\0\0\0", "its shape holds 2 values, but data 1"),
    ],
)
def test_wrong_binary_tensors_are_named(
    app: apps.App, datatype: str, size: Any, data: bytes, said: str
) -> None:
    age = {
        "name": "age",
        "shape": [2],
        "datatype": datatype,
        "parameters": {"binary_data_size": size},
    }
    head = json.dumps({"inputs": [CITY, age]}).encode()
    header = {"inference-header-content-length": str(len(head))}
    answer = app.post(INFER, content=head + data, headers=header)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


@pytest.mark.parametrize("length", ["", "x", "-1", "99999", "9" * 30, "²", "1e2"])
def test_a_wrong_header_length_is_named(app: apps.App, length: str) -> None:
    header = {"inference-header-content-length": length.encode()}
    answer = app.post(INFER, json={"inputs": [AGE, CITY]}, headers=header)
    assert answer.status_code == 422
    assert "Inference-Header-Content-Length" in answer.json()["error"]


def test_a_version_that_another_takes_over_from_is_not_answered_for(app: apps.App) -> None:
    async def change() -> None:
        app.local.runtime.version = 4

    app.local.before = change
    try:
        answer = app.post("/v2/models/people/versions/3/infer", json={"inputs": [AGE, CITY]})
        assert answer.status_code == 404
        assert app.post(INFER, json={"inputs": [AGE, CITY]}).json()["model_version"] == "4"
    finally:
        app.local.runtime.version = 3


def test_a_number_to_predict(diabetes: Runtime) -> None:
    app = apps.app(diabetes)
    names = [c.name for c in diabetes.schema.columns]
    inputs = [{"name": n, "shape": [1], "datatype": "FP32", "data": [0.5]} for n in names]
    (value,) = app.post("/v2/models/diabetes/infer", json={"inputs": inputs}).json()["outputs"]
    expected = by_predict(app, [dict.fromkeys(names, 0.5)])
    assert value == {
        "name": "value",
        "datatype": "FP64",
        "shape": [1],
        "data": [expected[0]["value"]],
    }


# --- an independent client -----------------------------------------------------------------------


def tensor(name: str, values: np.ndarray, datatype: str, *, binary: bool) -> InferInput:
    made = InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def triton(app: apps.App, path: str, inputs: list[InferInput], **options: Any) -> Any:
    """The answer as Triton's client writes requests and reads answers."""
    body, length = InferenceServerClient.generate_request_body(inputs, **options)
    header = {"inference-header-content-length": str(length)} if length is not None else {}
    answer: httpx.Response = app.post(path, content=body, headers=header)
    assert answer.status_code == 200, answer.text
    head = answer.headers.get("inference-header-content-length")
    return InferenceServerClient.parse_response_body(
        answer.content, header_length=int(head) if head else None
    )


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("back", [True, False])
def test_triton_s_client_of_a_table(app: apps.App, given: bool, back: bool) -> None:
    ages = np.array([row["age"] for row in ROWS], np.float32)
    cities = np.array([row["city"] for row in ROWS], object)
    result = triton(
        app,
        INFER,
        [
            tensor("age", ages, "FP32", binary=given),
            tensor("city", cities, "BYTES", binary=given),
        ],
        outputs=[InferRequestedOutput(n, binary_data=back) for n in ("label", "probabilities")],
        request_id="r7",
    )
    expected = by_predict(app, ROWS)
    labels = [
        text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("label")
    ]
    assert labels == [e["label"] for e in expected]
    np.testing.assert_array_equal(
        result.as_numpy("probabilities"),
        np.array([list(e["probabilities"].values()) for e in expected], np.float32),
    )
    told = result.get_response()
    assert (told["id"], told["model_version"]) == ("r7", "3")


def test_triton_s_client_of_images_with_everything_binary(digits: Runtime) -> None:
    app = apps.app(digits)
    x = np.random.default_rng(0).integers(0, 17, (5, 8, 8)).astype(np.float32)
    path = "/v2/models/digits/infer"
    result = triton(app, path, [tensor("image", x, "FP32", binary=True)])
    expected = by_predict(app, [{"image": image} for image in x.tolist()])
    np.testing.assert_array_equal(
        result.as_numpy("probabilities"),
        np.array([list(e["probabilities"].values()) for e in expected], np.float32),
    )
    assert [t.decode() for t in result.as_numpy("label")] == [e["label"] for e in expected]
    whole = triton(app, path, [tensor("image", x.astype(np.uint8), "UINT8", binary=True)])
    np.testing.assert_array_equal(whole.as_numpy("probabilities"), result.as_numpy("probabilities"))


def test_an_image_of_another_shape_or_range_is_named(digits: Runtime) -> None:
    app = apps.app(digits)
    for shape, value, said in [
        ([1, 8, 9], 1.0, "nested lists of shape [8, 8]"),
        ([1, 64], 1.0, "nested lists of shape [8, 8]"),
        ([1, 8, 8], 17.0, "lie between 0 and 16"),
    ]:
        image = {"name": "image", "shape": shape, "datatype": "FP32"}
        data = np.full(shape, value).tolist()
        answer = app.post("/v2/models/digits/infer", json={"inputs": [{**image, "data": data}]})
        assert answer.status_code == 422
        assert said in answer.json()["error"]
