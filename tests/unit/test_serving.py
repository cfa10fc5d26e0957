"""A version's folder and its runtime, without Ray: what goes in comes out, and what is refused.

tests/ray/test_endpoint.py has the same version over HTTP and in the registry.
"""

from __future__ import annotations

import json
import pickletools
import shlex
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lepton_ray import data, models
from lepton_ray.config.schema import ImageData, Model, Serve, TableData, TextData
from lepton_ray.data import Dataset
from lepton_ray.errors import ModelError, RunError, ServingError
from lepton_ray.pipeline.checks import score
from lepton_ray.serving import endpoint, manifest, package
from lepton_ray.serving.app import application
from lepton_ray.serving.requests import RowsError, columns_of
from lepton_ray.serving.runtime import CHUNK, Runtime
from lepton_ray.serving.signature import signature
from lepton_ray.serving.torch_model import TorchModel
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.tasks import task_of
from tests import apps

BLANK = [[0.0] * 8] * 8


@dataclass(frozen=True)
class Built:
    folder: Path
    model: nn.Module
    dataset: Dataset
    manifest: dict[str, Any]

    @property
    def runtime(self) -> Runtime:
        return Runtime.load(self.folder)


def build(folder: Path, dataset: Dataset, model: Model) -> Built:
    torch.manual_seed(0)
    fitted = dataset.preprocess
    made = models.build(model, fitted.input_shape, dataset.schema.outputs, fitted.facts)
    manifest = package.build(
        folder,
        model=made,
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        experiment_yaml="name: test\n",
        sample_x=dataset.test.x[:64],
        max_batch=64,
        provenance={"software": {"lepton-ray": "9.9"}},
    )
    return Built(folder, made, dataset, manifest)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Built:
    dataset = data.load(ImageData(kind="image", source="sklearn:digits"))
    return build(tmp_path_factory.mktemp("digits") / "v", dataset, Model(name="cnn", width=4))


def build_people(root: Path, **preprocess: Any) -> Built:
    frame = pd.DataFrame(
        {
            "age": np.arange(300, dtype=float),
            "city": ["Bonn", "Rom", 'Oslo\'s "old" town'] * 100,
            "y": ["yes", "no"] * 150,
        }
    )
    if preprocess:
        frame.loc[::7, "age"] = np.nan
    frame.to_csv(root / "people.csv", index=False)
    settings = TableData(
        kind="table", source=str(root / "people.csv"), target="y", preprocess=preprocess
    )
    return build(root / "v", data.load(settings), Model(name="mlp", width=8))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_people(tmp_path_factory.mktemp("people"))


@pytest.fixture
def copy(digits: Built, tmp_path: Path) -> Path:
    return shutil.copytree(digits.folder, tmp_path / "copy")


def rows(built: Built, n: int) -> list[dict[str, Any]]:
    return package.rows(built.dataset.schema, built.dataset.test_columns, n)


def refused(built: Built, *sent: Any) -> list[tuple[int, str, str, str]]:
    with pytest.raises(RowsError) as caught:
        built.runtime.predict(sent)
    return [(p.row, p.field, p.rule, p.value) for p in caught.value.problems]


# --- what goes in comes out ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_a_version_answers_as_the_model_it_was_made_of(
    digits: Built, tmp_path: Path, name: str
) -> None:
    if name != "cnn":
        digits = build(tmp_path / "v", digits.dataset, Model(name=name, width=4))
    answers = digits.runtime.predict(rows(digits, 50))
    logits = digits.model.eval()(torch.from_numpy(digits.dataset.test.x[:50]))
    expected = torch.softmax(logits, 1).numpy()
    given = np.array([list(a.probabilities.values()) for a in answers])
    np.testing.assert_allclose(given, expected, atol=package.TOLERANCE)
    assert [a.label for a in answers] == [str(i) for i in expected.argmax(1)]
    assert list(answers[0].probabilities) == list("0123456789")


def test_the_manifest_names_the_weights_and_every_file(digits: Built) -> None:
    assert digits.manifest["weights_sha256"] == state_sha256(digits.model.state_dict())
    assert digits.runtime.manifest == digits.manifest
    there = {p.name for p in digits.folder.iterdir()} - {"manifest.json"}
    assert set(digits.manifest["files"]) == there
    assert {"model.pt2", "model.onnx", "schema.json", "experiment.yaml"} <= there
    assert digits.manifest["parity"]["largest_difference_over_runtimes"] <= package.TOLERANCE


def test_building_leaves_the_model_alone_and_replaces_what_was_there(
    digits: Built, tmp_path: Path
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "old").touch()
    again = build(tmp_path / "v", digits.dataset, Model(name="cnn", width=4))
    assert again.model.training
    assert not (tmp_path / "v" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["v"], "nothing is left beside it"
    assert again.manifest["weights_sha256"] == digits.manifest["weights_sha256"]


def test_an_answer_does_not_depend_on_the_rows_beside_it(people: Built) -> None:
    sent = rows(people, 60) * 5
    assert len(sent) > CHUNK, "so that it goes through the model in two parts"
    together = people.runtime.predict(sent)
    assert together == [a for row in sent for a in people.runtime.predict([row])]
    assert together[:60] == together[60:120]
    assert people.runtime.predict([]) == []


def test_nothing_in_the_folder_can_be_unpickled(digits: Built) -> None:
    """By content and not by name: pickles of protocol 2 and later start with 0x80."""
    contents = {p.name: p.read_bytes() for p in digits.folder.iterdir()}
    with zipfile.ZipFile(digits.folder / "model.pt2") as archive:
        contents |= {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("weights/weight_0") for name in contents), sorted(contents)
    assert [name for name, content in contents.items() if is_pickle(content)] == []


def is_pickle(content: bytes) -> bool:
    if content[:1] != b"\x80" and not content.endswith(b"."):
        return False
    try:
        return sum(1 for _ in pickletools.genops(content)) > 2
    except Exception:
        return False


def test_a_model_that_exports_to_other_answers_is_not_built(
    digits: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = package.run_session
    monkeypatch.setattr(package, "run_session", lambda s, x: real(s, x) + np.eye(10)[0] * 1e-3)
    with pytest.raises(RunError, match="differs from torch by .* it was not registered"):
        build(tmp_path / "v", digits.dataset, Model(name="cnn", width=4))
    assert not (tmp_path / "v").exists()


def test_a_model_that_mixes_rows_is_not_built(
    digits: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = package.run_session
    monkeypatch.setattr(package, "run_session", lambda s, x: real(s, x + (x.mean(0) - x) * 0.1))
    with pytest.raises(RunError, match="differs from batch size 2 by"):
        build(tmp_path / "v", digits.dataset, Model(name="cnn", width=4))


# --- folders that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.pt2", "schema.json", "preprocess.safetensors", "experiment.yaml"]
)
def test_a_changed_or_missing_file_is_refused_by_name(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} was changed after it was made"):
        Runtime.load(copy)
    (copy / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        Runtime.load(copy)


@pytest.mark.parametrize("rest", [{}, {"files": {}}, {"files": ["in another form"]}])
def test_a_newer_format_is_refused_whatever_else_it_says(copy: Path, rest: dict) -> None:
    newer = {"format": manifest.FORMAT + 1, "software": {"lepton-ray": "7.1"}, **rest}
    (copy / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(
        ModelError, match=f"has format {manifest.FORMAT + 1}, made by lepton_ray 7.1; .* install"
    ):
        Runtime.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "a", "files": {}}', "1"])
def test_a_broken_manifest_is_not_a_version(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match="is not a model version of lepton_ray"):
        Runtime.load(copy)


def test_any_other_folder_is_not_a_version(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model version of lepton_ray"):
        Runtime.load(tmp_path)


# --- rows that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_with_a_number_that_is_none(digits: Built, bad: float) -> None:
    image = [[bad, *BLANK[0][1:]], *BLANK[1:]]
    ((row, field, rule, value),) = refused(digits, rows(digits, 1)[0], {"image": image})
    assert (row, field) == (1, "image")
    assert rule.startswith("the numbers of an image must be finite (this has ")
    assert str(bad) in value


def test_an_image_with_a_number_beyond_every_type(digits: Built) -> None:
    image = [[10**40, *BLANK[0][1:]], *BLANK[1:]]
    ((_, _, rule, _),) = refused(digits, rows(digits, 1)[0], {"image": image})
    assert rule == "the numbers of an image lie between 0 and 16 (this has 1e+40 at [0, 0])"


@pytest.mark.parametrize("image", [None, {}, [], [BLANK], [["0"] * 8] * 8, [[10**400] * 8] * 8])
def test_an_image_of_another_form(digits: Built, image: Any) -> None:
    ((row, field, rule, value),) = refused(digits, {"image": image})
    assert (row, field) == (0, "image")
    assert "numbers in nested lists of shape [8, 8]" in rule
    assert value == repr(image)[:80] + "..." * (len(repr(image)) > 80)


@pytest.mark.parametrize("age", ["7", None, float("nan"), float("inf"), [1], 10**400])
def test_a_number_that_is_none(people: Built, age: Any) -> None:
    ((row, field, rule, value),) = refused(people, {"age": age, "city": "Rom"})
    assert (row, field, rule) == (0, "age", "must be a finite number")
    assert value.startswith(repr(age)[:70])


@pytest.mark.parametrize("city", [3, True, ["Rom"]])
def test_a_category_that_is_no_text(people: Built, city: Any) -> None:
    assert refused(people, {"age": 1.0, "city": city}) == [
        (0, "city", "must be a text", repr(city))
    ]


def test_every_problem_of_every_row_is_told_in_order(people: Built) -> None:
    sent = [{"age": 1.0}, "a row", {"age": 1.0, "city": "Rom"}, {"zip": 1, "agee": 2, "city": 3}]
    found = refused(people, *sent)
    known = "no such field; known: age, city"
    assert found == [
        (0, "city", "this field is required", "none"),
        (1, "", "a row is an object with the fields age, city", "'a row'"),
        (3, "agee", known, "2"),
        (3, "zip", known, "1"),
        (3, "age", "this field is required", "none"),
        (3, "city", "must be a text", "3"),
    ]


def test_a_row_the_model_has_no_finite_answer_to_is_refused_and_named(people: Built) -> None:
    good = rows(people, 2)
    ((row, field, rule, _),) = refused(people, *good, {"age": 1e300, "city": "Rom"})
    assert (row, field) == (2, "")
    assert "no finite answer" in rule


def test_infinity_is_refused_also_where_the_model_has_a_number_for_it(tmp_path: Path) -> None:
    runtime = apps.people(tmp_path, Model(name="tests.nets:deaf"))
    with pytest.raises(RowsError, match="no finite answer"):
        runtime.predict([{"age": 1e300, "city": "Rom"}])


# --- tables --------------------------------------------------------------------------------------


def test_a_city_never_seen_is_no_city_and_no_error(people: Built) -> None:
    unseen, other, known = people.runtime.predict(
        [{"age": 7, "city": c} for c in ("Atlantis", "", "Rom")]
    )
    assert unseen == other != known
    assert sum(unseen.probabilities.values()) == pytest.approx(1, abs=1e-6)


def test_whole_numbers_and_fractions_are_the_same_number(people: Built) -> None:
    whole, fraction = people.runtime.predict([{"age": a, "city": "Rom"} for a in (7, 7.0)])
    assert whole == fraction


# --- a number to predict --------------------------------------------------------------------------


def test_a_regression_answers_in_the_unit_of_its_target(tmp_path: Path) -> None:
    settings = TableData(
        kind="table", source="sklearn:diabetes", target="target", task="regression"
    )
    built = build(tmp_path / "v", data.load(settings), Model(name="mlp", width=8))
    sent = rows(built, 40)
    values = np.array([answer.value for answer in built.runtime.predict(sent)])
    with torch.no_grad():
        outputs = built.model.eval()(torch.from_numpy(built.dataset.test.x[:40]))
    expected = task_of(built.dataset).answers(outputs, built.dataset.test)[:, 0]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert built.dataset.train.y.min() < values.mean() < built.dataset.train.y.max()
    assert built.runtime.predict(sent[:1])[0].value == values[0]
    assert score(built.runtime, built.dataset)["mae"] < 100
    assert signature(built.dataset.schema).outputs.input_names() == ["value"]


# --- the line for a shell ------------------------------------------------------------------------


def test_the_curl_line_survives_a_shell_whatever_the_texts_hold(people: Built) -> None:
    row = {"age": 1.5, "city": 'O\'Brien "$HOME" `id` \\ é\n!'}
    line = endpoint.curl(endpoint.Live("people@champion", 1, "http://127.0.0.1:1", None), row)
    assert json.loads(shlex.split(line)[-1]) == {"rows": [row]}
    printed = subprocess.run(
        ["sh", "-c", line.replace("curl -s", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(printed.splitlines()[-1]) == {"rows": [row]}


# --- on another device ---------------------------------------------------------------------------


def build_texts(root: Path, model: str) -> Built:
    frame = pd.DataFrame(
        {"text": ["good and warm", "bad and cold weather", "fine"] * 40, "y": ["a", "b", "a"] * 40}
    )
    frame.to_csv(root / "texts.csv", index=False)
    settings = TextData(kind="text", source=str(root / "texts.csv"), text="text", target="y")
    return build(root / "texts", data.load(settings), Model(name=model, width=8))


@pytest.mark.parametrize("kind", ["digits", "people", "text_bag", "text_transformer"])
def test_torch_answers_as_onnx_runtime_does(
    digits: Built, people: Built, tmp_path: Path, kind: str
) -> None:
    built = {"digits": digits, "people": people}.get(kind) or build_texts(tmp_path, kind)
    by_torch = Runtime.load(built.folder, device="cpu")
    columns = columns_of(built.dataset.schema, rows(built, 20))
    expected = built.runtime.predict_columns(columns)
    np.testing.assert_allclose(by_torch.predict_columns(columns), expected, atol=package.TOLERANCE)
    assert np.ptp(expected, axis=0).max() > 1e-3, "rows that are all alike show nothing"
    by_torch.warm_up(3)


def test_a_device_that_computes_otherwise_does_not_serve(
    digits: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TorchModel.__call__
    monkeypatch.setattr(TorchModel, "__call__", lambda self, x: right(self, x) + np.float32(0.1))
    with pytest.raises(ModelError, match="on cpu the model differs from ONNX Runtime by 1.00e-01"):
        Runtime.load(digits.folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_find_is_named(digits: Built) -> None:
    with pytest.raises(ServingError, match=r"finds no GPU .* leave serve.gpus at 0"):
        Runtime.load(digits.folder, device="cuda")


def test_replicas_ask_for_their_part_of_a_gpu() -> None:
    def asked(**given: Any) -> Any:
        config = Serve(explain=False, **given)
        bound: Any = application(None, "m", config)
        return bound._bound_deployment.ray_actor_options

    assert asked(gpus=0.25)["num_gpus"] == 0.25
    assert "num_gpus" not in asked()
