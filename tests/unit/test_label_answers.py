"""Several labels a row: what a version answers, in every form that it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.data.decision import LabelDecision
from lepton_ray.errors import InputError
from lepton_ray.pipeline import batch, checks, promotion, reports
from lepton_ray.pipeline.batch import parts
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.runtime import Runtime
from tests import apps, stores, versions
from tests.unit.test_batch import Lines

LABELS = ("old", "roman", "even")
EXPERIMENT = validate(
    {
        "name": "people",
        "data": {"kind": "table", "source": "people.csv", "target": list(LABELS)},
        "model": {"name": "mlp", "width": 16},
    }
)
ROWS = [{"age": 290.0, "city": "Rom"}, {"age": 3.0, "city": "Bonn"}]


def write(path: Path) -> None:
    age, city = np.arange(300.0), np.array(["Bonn", "Rom", "Oslo"] * 100)
    labels = {"old": age > 150, "roman": city == "Rom", "even": age % 2 == 0}
    pd.DataFrame({"age": age, "city": city, **labels}).to_csv(path, index=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    path = tmp_path_factory.mktemp("data") / "people.csv"
    write(path)
    section = EXPERIMENT.data.model_copy(update={"source": str(path)})
    return data.load(section, ["city"])


@pytest.fixture(scope="module")
def trained(dataset: data.Dataset) -> Any:
    return apps.fitted(dataset, EXPERIMENT.model)


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, dataset: data.Dataset, trained: Any
) -> tuple[Explainer, Runtime]:
    return apps.made(tmp_path_factory.mktemp("version") / "v", dataset, trained)


@pytest.fixture(scope="module")
def runtime(both: tuple[Explainer, Runtime]) -> Runtime:
    return both[1]


@pytest.fixture(scope="module")
def app(both: tuple[Explainer, Runtime]) -> apps.App:
    return apps.app(both[1], explainer=both[0])


def test_a_row_is_answered_with_its_labels_and_each_probability(app: apps.App) -> None:
    answered = app.post("/predict", json={"rows": ROWS}).json()["predictions"]
    assert answered == [a.model_dump() for a in app.local.runtime.predict(ROWS)]
    for answer in answered:
        chosen = [name for name in LABELS if answer["probabilities"][name] > 0.5]
        assert answer["labels"] == chosen
    assert {"old", "roman"} <= set(answered[0]["labels"])
    assert not {"old", "roman"} & set(answered[1]["labels"])
    few = app.post("/predict?top_k=1", json={"rows": ROWS}).json()["predictions"]
    assert [len(a["probabilities"]) for a in few] == [1, 1]
    assert [a["labels"] for a in few] == [a["labels"] for a in answered]


def test_the_description_says_what_is_answered(app: apps.App) -> None:
    components = app.get("/openapi.json").json()["components"]["schemas"]
    assert components["LabelsResponse"]["properties"]["predictions"]["items"]["$ref"].endswith(
        "LabelsAnswer"
    )
    assert components["LabelsAnswer"]["properties"].keys() == {"labels", "probabilities"}


def test_the_protocol_says_of_each_label_whether_it_is_there(app: apps.App) -> None:
    told = app.get("/v2/models/test").json()["outputs"]
    assert [(o["name"], o["datatype"], o["shape"]) for o in told] == [
        ("labels", "BOOL", [-1, 3]),
        ("probabilities", "FP32", [-1, 3]),
    ]
    assert all(json.loads(o["parameters"]["classes"]) == list(LABELS) for o in told)
    inputs = [
        {"name": "age", "shape": [2], "datatype": "FP64", "data": [290, 3]},
        {"name": "city", "shape": [2], "datatype": "BYTES", "data": ["Rom", "Bonn"]},
    ]
    answer = app.post("/v2/models/test/infer", json={"inputs": inputs}).json()["outputs"]
    rows = app.local.runtime.predict(ROWS)
    assert answer[0]["data"] == [name in a.labels for a in rows for name in LABELS]
    assert answer[1]["data"] == pytest.approx([p for a in rows for p in a.probabilities.values()])
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    response = app.post("/v2/models/test/infer", json=asked)
    behind = response.content[int(response.headers["inference-header-content-length"]) :]
    assert list(map(bool, behind[:6])) == answer[0]["data"], "a byte for each"


def test_the_page_has_examples_of_each_label_with_all_of_theirs(app: apps.App) -> None:
    model = app.get("/page.json").json()
    assert model["classes"] == list(LABELS)
    answers = [example["answer"] for example in model["examples"]]
    assert {name for labels in answers for name in labels} == set(LABELS)


def test_a_label_is_explained_the_likeliest_by_itself(app: apps.App) -> None:
    young = [{"age": 3.0, "city": "Rom"}]
    (found,) = app.post("/explain", json={"rows": young}).json()["explanations"]
    probabilities = app.local.runtime.predict(young)[0].probabilities
    assert max(probabilities, key=lambda name: probabilities[name]) == "roman"
    assert found["target"] == "roman"
    assert found["answer"] == pytest.approx(probabilities[found["target"]], abs=1e-5)
    for target, column in (("old", "age"), ("roman", "city")):
        answer = app.post(f"/explain?target={target}", json={"rows": ROWS[:1]}).json()
        (found,) = answer["explanations"]
        assert (found["target"], found["parts"][0]["name"]) == (target, column)
    assert app.post("/explain?target=odd", json={"rows": ROWS[:1]}).status_code == 422


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_of_answers_holds_labels_and_probabilities(
    suffix: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "load_model", lambda reference: runtime)
    source, output = tmp_path / "rows.jsonl", tmp_path / f"out{suffix}"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    batch.predict("test/3", [str(source)], output=str(output), terminal=Lines())
    expected = runtime.predict(ROWS)
    if suffix == ".jsonl":
        lines = output.read_text().splitlines()
        assert [json.loads(line) for line in lines] == [a.model_dump() for a in expected]
        return
    if suffix == ".csv":
        found = pd.read_csv(output)
        found["labels"] = found["labels"].map(json.loads)
    else:
        found = pq.read_table(output).to_pandas()
    assert list(found) == ["labels", *(f"probability_{name}" for name in LABELS)]
    assert [list(labels) for labels in found["labels"]] == [a.labels for a in expected]
    wanted = [list(a.probabilities.values()) for a in expected]
    assert found.to_numpy()[:, 1:].astype(float).tolist() == pytest.approx(np.array(wanted))
    with pytest.raises(InputError, match="an answer has 'labels' of its own"):
        parts.check_kept(runtime.schema, suffix, ["labels"])


def test_thresholds_and_scales_travel_with_a_version(tmp_path: Path, dataset: data.Dataset) -> None:
    decided = LabelDecision(scale=(1.0, 0.5, 2.0), shift=(0.0, 1.0, 0.0), threshold=(0.9, 0.2, 0.5))
    other = apps.version(tmp_path / "v", dataset, EXPERIMENT.model, "decided", decided)
    assert other.decision == decided
    found = other.predict_columns(dataset.test_columns)
    wanted = [[n for n, p, t in zip(LABELS, row, decided.threshold, strict=True) if p > t]
              for row in found]  # fmt: skip
    assert [a.labels for a in other.answers(found)] == wanted
    said = reports.decision_table(other.schema, decided)
    assert "logits times 0.5 plus 1; 'roman' above 0.2000" in said
    changed = found.copy()
    changed[7, 1] = 1.0 if found[7, 1] <= 0.2 else 0.0
    assert other.agree(found, other, changed, 0.0) == len(found) - 1, "a row agrees in all labels"
    assert other.agree(found, other, found.copy(), 0.0) == len(found)
    plain = apps.version(tmp_path / "plain", dataset, EXPERIMENT.model, "plain")
    alike = [(p > t) == (p > 0.5) for p, t in zip(found.T, decided.threshold, strict=True)]
    both = int(np.all(alike, axis=0).sum())
    assert 0 <= both < len(found), "each decides its own"
    assert other.agree(found, plain, found, 0.0) == both


def test_a_version_is_scored_by_its_labels_names(runtime: Runtime, dataset: data.Dataset) -> None:
    found = checks.score(runtime, dataset)
    assert found["auc"] > 0.6
    assert found.keys() >= {"subset_accuracy", "f1_micro", "f1_macro", "average_precision"}
    each = checks.score_labels(runtime, dataset)
    assert list(each) == list(LABELS)
    assert each["roman"]["samples"] == dataset.test.y[:, 1].sum()
    assert np.mean([of["auc"] for of in each.values()]) == pytest.approx(found["auc"])
    assert "       roman" in reports.label_table(each)
    sliced = checks.score_slices(runtime, dataset)["city"]
    assert set(sliced) == {"Bonn", "Oslo", "Rom"}
    assert "subset_accuracy" in reports.slice_table("city", sliced)


def test_mlflow_loads_it_and_versions_are_compared(
    tmp_path: Path, trained: Any, dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "people.csv")
    same = data.load(EXPERIMENT.data)
    version = versions.register(EXPERIMENT, same, trained, tmp_path)
    runtime = Runtime.load(version.folder())
    loaded = mlflow.pyfunc.load_model(f"models:/people/{version.version}")
    answered = loaded.predict(pd.DataFrame(ROWS))
    expected = runtime.predict(ROWS)
    assert [list(labels) for labels in answered["labels"]] == [a.labels for a in expected]
    assert answered["probability_old"].tolist() == [a.probabilities["old"] for a in expected]
    names = [column.name for column in loaded.metadata.signature.outputs]
    assert names == ["labels", *(f"probability_{name}" for name in LABELS)]
    compared = promotion.compare(["people/1", "people/1"], Lines())
    assert compared["agreement"] == [1.0, 1.0]
    assert compared["metrics"][0] == pytest.approx(checks.score(runtime, same))
