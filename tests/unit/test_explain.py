"""Explanations: complete, right where the truth is known, better than chance where it is not."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lepton_ray import data
from lepton_ray.config.schema import Experiment, ImageData, Model, TableData, TextData
from lepton_ray.data import Dataset
from lepton_ray.errors import InputError
from lepton_ray.pipeline import explaining
from lepton_ray.serving import package
from lepton_ray.serving.explain.answers import METHODS
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.keys import Keyring, make
from lepton_ray.serving.requests import RowsError, columns_of
from lepton_ray.serving.runtime import Runtime
from lepton_ray.terminal import Silent
from lepton_ray.training.importance import measure
from tests import apps


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two, which would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(ImageData(kind="image", source="sklearn:digits"))


@pytest.fixture(scope="module")
def of_digits(
    digits: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Explainer, Runtime]:
    module = apps.fitted(digits, Model(name="cnn", width=8))
    return apps.made(tmp_path_factory.mktemp("digits") / "v", digits, module)


@pytest.fixture(scope="module")
def of_people(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explainer, Runtime, Dataset]:
    """What is asked depends on age above 40 and a little on the city, and not on the shoe."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    n = 900
    age, shoe = rng.uniform(10, 90, n), rng.normal(40, 3, n)
    city = rng.choice(["Bonn", "Oslo", "Rom"], n, p=[0.5, 0.2, 0.3])
    y = np.where(age + 15 * (city == "Rom") > 45, "yes", "no")
    pd.DataFrame({"shoe": shoe, "city": city, "age": age, "y": y}).to_csv(
        folder / "people.csv", index=False
    )
    dataset = data.load(TableData(kind="table", source=str(folder / "people.csv"), target="y"))
    module = apps.fitted(dataset, Model(name="mlp", width=16))
    return *apps.made(folder / "v", dataset, module), dataset


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = apps.write_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv", 600)
    return data.load(TextData(kind="text", source=str(source), text="text", target="mood"))


@pytest.fixture(scope="module")
def of_texts(
    reviews: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Explainer, Runtime]:
    module = apps.fitted(reviews, Model(name="text_cnn", width=8), steps=150)
    return apps.made(tmp_path_factory.mktemp("of-texts") / "v", reviews, module)


def row_of(explainer: Explainer, **row: Any) -> dict[str, Any]:
    return columns_of(explainer.schema, [row])


PERSON = {"shoe": 41.0, "city": "Rom", "age": 20.0}


def test_weights_of_images_are_complete(
    of_digits: tuple[Explainer, Runtime], digits: Dataset
) -> None:
    explainer, runtime = of_digits
    columns = {"image": digits.test_columns["image"][:20]}
    answers = runtime.predict_columns(columns)
    for explanation, answer in zip(explainer.explain(columns), answers, strict=True):
        assert explanation.method == "integrated_gradients"
        assert explanation.target == runtime.schema.classes[int(answer.argmax())]
        assert explanation.answer == pytest.approx(float(answer.max()), abs=1e-5)
        whole = np.sum(explanation.weights) - explanation.completeness.difference
        assert abs(whole) <= 0.05 * abs(explanation.completeness.difference)
        assert explanation.completeness.holds


def test_deleting_what_weighs_most_hurts_more_than_chance(
    of_digits: tuple[Explainer, Runtime], digits: Dataset
) -> None:
    """The deletion test of Petsiuk et al., "RISE" (2018): pixels go black, heaviest first."""
    explainer, runtime = of_digits
    images = digits.test_columns["image"][:60].astype(np.float32)
    rng = np.random.default_rng(0)
    for method in ("integrated_gradients", "occlusion"):
        found = explainer.explain({"image": images}, method)
        curves: dict[str, list[float]] = {"weights": [], "chance": []}
        for image, explanation in zip(images, found, strict=True):
            orders = {
                "weights": np.argsort(-np.ravel(explanation.weights)),
                "chance": rng.permutation(64),
            }
            for name, order in orders.items():
                steps = np.repeat(image.reshape(1, 64), 17, axis=0)
                for step in range(17):
                    steps[step, order[: 4 * step]] = 0.0
                probabilities = runtime.predict_columns({"image": steps.reshape(-1, 8, 8)})
                target = runtime.schema.classes.index(explanation.target)
                curves[name].append(float(probabilities[:, target].mean()))
        assert np.mean(curves["weights"]) < 0.8 * np.mean(curves["chance"]), method


@pytest.mark.parametrize("method", METHODS)
def test_a_column_has_one_weight_and_the_right_one(
    of_people: tuple[Explainer, Runtime, Dataset], method: str
) -> None:
    explainer, _, _ = of_people
    (found,) = explainer.explain(row_of(explainer, **PERSON), method)
    assert found.parts is not None
    names = [part.name for part in found.parts]
    assert (names[0], sorted(names)) == ("age", ["age", "city", "shoe"])
    assert (found.parts[0].value, found.target, found.method) == (20.0, "no", method)
    weights = {part.name: part.weight for part in found.parts}
    assert weights["age"] > 0 > weights["city"], "young speaks for no, Rome against it"
    if method in ("integrated_gradients", "kernel_shap"):
        assert found.completeness.holds
    whole = abs(sum(weights.values()) - found.completeness.difference)
    assert found.completeness.error == pytest.approx(whole, abs=1e-6)


def test_the_baseline_of_a_table_is_its_mean_row(
    of_people: tuple[Explainer, Runtime, Dataset], tmp_path: Path
) -> None:
    explainer, _, dataset = of_people
    (found,) = explainer.explain(row_of(explainer, **PERSON), target="yes")
    mean = torch.from_numpy(dataset.train.x.mean(axis=0, keepdims=True))
    expected = torch.softmax(explainer._program(mean), 1)[0, 1]
    assert found.baseline_answer == pytest.approx(float(expected), abs=1e-5)


def test_words_weigh_where_they_stand(of_texts: tuple[Explainer, Runtime]) -> None:
    explainer, _ = of_texts
    text = "The film is  LOVELY, zzz"
    for method in (None, *METHODS):
        (found,) = explainer.explain(row_of(explainer, text=text), method)
        assert found.parts is not None
        assert [part.name for part in found.parts] == ["The", "film", "is", "LOVELY", ",", "zzz"]
        assert all(text[p.start : p.end] == p.name for p in found.parts)
        best = max(found.parts, key=lambda part: part.weight)
        assert (best.name, found.target) == ("LOVELY", "good")
    (found,) = explainer.explain(row_of(explainer, text=text))
    assert (found.method, found.completeness.holds) == ("integrated_gradients", True)
    (empty,) = explainer.explain(row_of(explainer, text=""))
    assert (empty.parts, empty.answer == empty.baseline_answer > 0) == ([], True)


def test_a_model_without_gradients_by_word_is_explained_by_shap(
    reviews: Dataset, tmp_path: Path
) -> None:
    """Pairs of words have vectors of their own."""
    module = apps.fitted(reviews, Model(name="text_bag", ngrams=2, buckets=500), steps=150)
    explainer, _ = apps.made(tmp_path / "v", reviews, module)
    row = row_of(explainer, text="a film so grim")
    (found,) = explainer.explain(row)
    assert (found.method, found.completeness.holds, found.target) == ("kernel_shap", True, "bad")
    with pytest.raises(InputError, match="no gradients by word: ask for kernel_shap"):
        explainer.explain(row, "integrated_gradients")
    assert explainer.explain(row)[0] == found, "the same question has the same answer"
    for method in ("kernel_shap", "lime"):
        (word,) = explainer.explain(row_of(explainer, text="grim"), method)
        assert word.completeness.holds, "one word has all of the weight"


@pytest.mark.parametrize("method", METHODS)
def test_what_has_no_answer_has_no_explanation(
    of_people: tuple[Explainer, Runtime, Dataset], method: str
) -> None:
    explainer, _, _ = of_people
    rows = columns_of(explainer.schema, [PERSON, PERSON | {"age": 1e300}])
    with pytest.raises(RowsError, match="row 1.* no finite answer"):
        explainer.explain(rows, method)
    with pytest.raises(RowsError, match="valid Unicode"):  # which no answer could repeat
        row_of(explainer, **PERSON | {"city": "\ud800"})


def test_an_explanation_over_http(of_digits: tuple[Explainer, Runtime], digits: Dataset) -> None:
    explainer, runtime = of_digits
    key, entry = make("a", ("predict",), None)
    app = apps.app(runtime, explainer=explainer)
    rows = package.rows(digits.schema, digits.test_columns, 9)
    answer = app.post("/explain", json={"rows": rows[:2]}, params={"target": "3"})
    # However long it takes, predictions keep their short way (`serving.short`).
    assert (app.lines[-1]["version"], app.asgi.took_s) == (runtime.version, 0)
    app.post("/predict", json={"rows": rows[:1]})
    assert app.asgi.took_s > 0
    assert answer.status_code == 200, answer.text
    assert (answer.json()["model"], answer.json()["version"]) == ("test", 3)
    first, _ = answer.json()["explanations"]
    assert first["target"] == "3"
    picture = Image.open(io.BytesIO(base64.b64decode(first["heat_map"])))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (224, 224), "RGB")
    for body, query, status, said in [
        (rows, {}, 413, "at most 8 rows"),
        (rows[:1], {"method": "kernelshap"}, 422, "did you mean 'kernel_shap'"),
        (rows[:1], {"target": "10"}, 422, "no class '10'"),
        ([{"image": "x"}], {}, 422, "base64"),
    ]:
        refused = app.post("/explain", json={"rows": body}, params=query)
        assert (refused.status_code, said in refused.text) == (status, True), refused.text
    guarded = apps.app(runtime, Keyring((entry,)), explainer)
    headers = {"authorization": f"Bearer {key}"}
    refused = guarded.post("/explain", json={"rows": rows[:1]}, headers=headers)
    assert (refused.status_code, "scope explain" in refused.text) == (403, True)
    assert apps.app(runtime).post("/explain", json={"rows": rows[:1]}).status_code == 404


def test_the_command_writes_lines_and_heat_maps(
    of_digits: tuple[Explainer, Runtime],
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    explainer, _ = of_digits
    monkeypatch.setattr(explaining.registry, "resolve", lambda reference: apps)
    monkeypatch.setattr(apps, "folder", lambda: None, raising=False)
    monkeypatch.setattr(explaining.Explainer, "load", lambda folder: explainer)
    source = tmp_path / "rows.jsonl"
    rows = package.rows(digits.schema, digits.test_columns, 3)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(output: str, **asked: Any) -> dict[str, Any]:
        options = {"method": None, "target": None, **asked}
        path = str(tmp_path / output)
        return explaining.explain("d/1", [str(source)], output=path, terminal=Silent(), **options)

    assert call("out.jsonl", target="7") == {
        "rows": 3,
        "output": str(tmp_path / "out.jsonl"),
        "incomplete": 0,
    }
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == ["7"] * 3
    with pytest.raises(InputError, match="the heat map of one picture"):
        call("out.png")
    source.write_text(json.dumps(rows[0]))
    call("out.png", method="occlusion")
    assert Image.open(tmp_path / "out.png").size == (224, 224)


def test_importance_finds_what_matters(
    of_people: tuple[Explainer, Runtime, Dataset], of_digits: tuple[Explainer, Runtime]
) -> None:
    _, runtime, dataset = of_people
    found = measure(apps.fitted(dataset, Model(name="mlp", width=16)), dataset, dataset.preprocess)
    names = [part["name"] for part in found["parts"]]
    rises = [part["loss_increase"] for part in found["parts"]]
    assert names == ["age", "city", "shoe"]
    assert rises[0] > 0.3 > rises[1] > 0.02 > abs(rises[2])
    assert (found["split"], found["samples"]) == ("validation", len(dataset.validation))


def test_a_version_carries_examples_of_each_class(
    of_people: tuple[Explainer, Runtime, Dataset], of_digits: tuple[Explainer, Runtime]
) -> None:
    _, runtime, _ = of_people
    assert [e["answer"] for e in runtime.examples] == ["no", "yes", "no", "yes", "no"]
    runtime.predict([example["row"] for example in runtime.examples])
    _, pictures = of_digits
    assert [e["answer"] for e in pictures.examples] == ["0", "1", "2", "3", "4"]
    row = pictures.examples[0]["row"]
    assert apps.app(pictures).post("/predict", json={"rows": [row]}).status_code == 200
    assert Experiment.model_fields["serve"].default.examples == 8


def test_importance_of_words(reviews: Dataset) -> None:
    module = apps.fitted(reviews, Model(name="text_cnn", width=8), steps=150)
    found = measure(module, reviews, reviews.preprocess)
    moods = {word for words in apps.WORDS.values() for word in words}
    assert all(part["name"] in moods for part in found["parts"][:4]), found["parts"]
    unimportant = {part["name"] for part in found["parts"][-3:]}
    assert unimportant & {"the", "film", "is"}
