"""Tables: types of columns, fitted preprocessing, and what a version made of one takes."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

from lepton_ray import data, models
from lepton_ray.config.schema import Model, TableData
from lepton_ray.data import dates, room, sources, spread
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.serving.requests import RowsError, columns_of
from lepton_ray.serving.tables import from_csv
from lepton_ray.training.tasks import task_of
from tests import apps

N = 240


def rows(**changed: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        "income": rng.lognormal(10, 1.5, N),
        "city": ["Bonn", "Rom", "Oslo"] * (N // 3),
        "joined": pd.date_range("2020-01-01", periods=N).strftime("%Y-%m-%d"),
        "member": [True, False] * (N // 2),
        "y": ["no", "yes", "no", "no"] * (N // 4),
    }
    return pd.DataFrame(columns | changed)


def load(tmp_path: Path, frame: pd.DataFrame, **settings: Any) -> data.Dataset:
    frame.to_csv(tmp_path / "t.csv", index=False)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": "y", **settings}
    return data.load(TableData.model_validate(section))


def test_types_are_those_of_the_values(tmp_path: Path) -> None:
    dataset = load(tmp_path, rows(zip=np.arange(N) % 7 + 10_000))
    kinds = {c.name: c.kind for c in dataset.schema.columns}
    assert kinds == {
        **{"income": "number", "city": "category", "joined": "date"},
        **{"member": "number", "zip": "number"},
    }
    declared = load(tmp_path, rows(zip=np.arange(N) % 7 + 10_000), types={"zip": "category"})
    assert declared.schema.columns[-1].categories[0] == "10000"


def test_a_declared_category_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("zip,y\n" + "01234,a\n05,b\n" * 30)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": "y"}
    dataset = data.load(TableData.model_validate(section | {"types": {"zip": "category"}}))
    assert dataset.schema.columns[0].categories == ("01234", "05")


def test_a_class_that_begins_with_a_zero_is_another_than_one_that_does_not(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n" + "1,01\n2,1\n3,10\n" * 30)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": "y"}
    assert data.load(TableData.model_validate(section)).schema.classes == ("01", "1", "10")
    (tmp_path / "t.csv").write_text("a,y\n" + "1, 0\n2, 1\n3, 10\n" * 30)
    assert data.load(TableData.model_validate(section)).schema.classes == ("0", "1", "10")
    (tmp_path / "t.csv").write_text("a,y\n" + "1,0.5\n2,01\n3,10\n" * 30)
    numbers = sources.read(TableData.model_validate(section | {"task": "regression"})).labels
    assert numbers[:3].tolist() == [0.5, 1.0, 10.0]


@pytest.mark.parametrize("missing", ["median", "mean"])
def test_a_gap_is_filled_from_the_training_split_and_said_to_be_one(
    tmp_path: Path, missing: str
) -> None:
    frame = rows()
    frame.loc[::5, "income"] = np.nan
    frame.loc[::7, "city"] = None
    fitted = load(tmp_path, frame, preprocess={"missing": missing}).preprocess
    ordinary = {"city": ["Rom"], "joined": ["2020-03-01"], "member": [True]}
    gap = fitted.apply({"income": [np.nan], **ordinary})
    fill = fitted.features[0].fill
    same = fitted.apply({"income": [fill], **ordinary})
    assert (gap[0, 1], same[0, 1]) == (1, 0)
    assert np.array_equal(np.delete(gap, 1, 1), np.delete(same, 1, 1))
    assert "" in fitted.columns[1].categories


def test_a_quantile_scale_keeps_the_order_and_draws_tails_in(tmp_path: Path) -> None:
    fitted = load(tmp_path, rows(), preprocess={"scale": "quantile"}).preprocess
    high = fitted.columns[0].high
    found = fitted.features[0]
    out = np.zeros((5, 1), np.float32)
    found.encode([high / 1e6, high / 4, high / 2, high, high * 1e9], out)
    assert (np.diff(out[:, 0]) >= 0).all()
    assert out[4] == out[3] < 4
    assert out[1] < out[2]


def test_a_value_of_most_rows_leaves_room_for_the_others(tmp_path: Path) -> None:
    gains = np.where(np.arange(N) % 12 == 0, np.arange(N), 0)
    dataset = load(tmp_path, rows(income=gains), preprocess={"scale": "quantile"})
    out = np.zeros((3, 1), np.float32)
    dataset.preprocess.features[0].encode([0, 100, 200], out)
    assert out[1] - out[0] > 0.3
    assert out[2] - out[1] > 0.3


def test_a_logarithm_is_for_columns_that_are_there(tmp_path: Path) -> None:
    fitted = load(tmp_path, rows(), preprocess={"log": ["income"]}).preprocess
    out = np.zeros((2, 1), np.float32)
    fitted.features[0].encode([np.e - 1, np.e**2 - 1], out)
    assert out[1, 0] - out[0, 0] == pytest.approx(fitted.features[0].scale, rel=1e-5)
    with pytest.raises(DataError, match="log names 'city', but the columns of numbers are income"):
        load(tmp_path, rows(), preprocess={"log": ["city"]})


def test_rare_categories_and_those_never_seen_are_one(tmp_path: Path) -> None:
    cities = ["Bonn"] * (N // 2) + ["Rom"] * (N // 2 - 4) + ["Ur", "Ys", "Ub", "Ai"]
    dataset = load(tmp_path, rows(city=cities), preprocess={"rare": 5})
    column, feature = dataset.schema.columns[1], dataset.preprocess.features[1]
    assert (column.categories, feature.blocks) == (("Bonn", "Rom"), (3,))
    out = np.zeros((3, 3), np.float32)
    feature.encode(["Rom", "Ur", "Atlantis"], out)
    assert out.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert any("rare categories are taken together in city" in note for note in dataset.notes)


def test_many_categories_are_bounded(tmp_path: Path) -> None:
    cities = [f"c{i % 60:02}" for i in range(N)]
    dataset = load(tmp_path, rows(city=cities), preprocess={"categories": 8})
    assert dataset.preprocess.features[1].blocks == (9,)


def test_dates_become_time_and_seasons(tmp_path: Path) -> None:
    feature = load(tmp_path, rows()).preprocess.features[2]
    assert feature.blocks == (1, 2, 2)
    out = np.zeros((3, 5), np.float32)
    feature.encode(["2024-01-01", "2024-01-08", "2025-01-01"], out)
    assert out[0, 3:] == pytest.approx(out[1, 3:], abs=1e-6)  # a week later
    assert out[0, 1:3] == pytest.approx(out[2, 1:3], abs=0.02)  # a year later
    assert out[1, 0] - out[0, 0] == pytest.approx(7 * 86_400 * feature.scale, rel=1e-3)


def test_dates_in_a_form_of_their_own(tmp_path: Path) -> None:
    frame = rows(joined=pd.date_range("2020-01-01", periods=N).strftime("%d.%m.%Y"))
    dataset = load(tmp_path, frame, types={"joined": "date %d.%m.%Y"})
    column = next(c for c in dataset.schema.columns if c.name == "joined")
    assert (column.kind, column.format) == ("date", "%d.%m.%Y")
    assert dates.seconds(["02.01.1970", ""], column.format)[0] == 86_400
    with pytest.raises(DataError, match=r"'joined' must be a date such as .* 240 of 240 are not"):
        load(tmp_path, frame, types={"joined": "date"})


def test_a_cell_says_the_same_in_training_and_in_a_request(tmp_path: Path) -> None:
    frame = rows(city=["NA", "Rom", ""] * (N // 3))
    frame.loc[::5, "income"] = np.nan
    frame.loc[1::7, "joined"] = None
    text = frame.fillna("n/a").to_csv(index=False)
    (tmp_path / "t.csv").write_text(text)
    preprocess = {"missing": "median"}
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": "y"}
    dataset = data.load(TableData.model_validate({**section, "preprocess": preprocess}))
    schema = dataset.schema
    assert schema.columns[1].categories == ("", "NA", "Rom")
    assert {c.name: c.kind for c in schema.columns}["joined"] == "date"
    lines = [line.rpartition(",")[0] for line in text.splitlines()]
    body = "\n".join(lines).encode()
    asked = columns_of(schema, from_csv(schema, body, len(lines)))
    again = dataset.preprocess.apply(asked)
    everything = np.concatenate([dataset.train.x, dataset.validation.x, dataset.test.x])
    assert len(again) == len(everything) == N
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(everything, axis=0))


@pytest.mark.parametrize("value", [0.1, 0.7, 1_000_000.1, 0.0])
def test_what_is_always_the_same_has_no_scale(value: float) -> None:
    values = np.full(1000, value)
    for given in (values, values.astype(np.float32), np.stack([values, values], axis=1)):
        assert not spread.deviation(given, axis=0).any()
    assert spread.deviation(np.append(values, value + 1e-6)) > 0


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-31", "20240131", "2024-01-31 10:00", "2024-01-31T10:00:00.123Z",
        "2024-01-31T10:00:00.1234567", "1500-01-01", "9999-12-31", "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59", "2024-W05-3", "2024-01-31T10:00:00,5", "2024-01-31x10:00",
        "2024-01-31T10:00:00+01:00:30", "2024-01", "2024", "2024-02-30", "31.01.2024", "",
    ],
)  # fmt: skip
def test_a_date_is_taken_if_it_can_be_read(text: str) -> None:
    (found,) = dates.seconds([text], dates.ISO)
    assert np.isfinite(found) == (dates.problem(text, dates.ISO) == "")
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(text).replace(microsecond=0)
        if np.isfinite(found) and moment.tzinfo is None:
            assert int(found) == (moment - datetime.datetime(1970, 1, 1)).total_seconds()


def test_a_date_is_the_same_whatever_is_beside_it() -> None:
    """With more than six digits pandas reads all in nanoseconds, which end in 2262."""
    texts = ["9999-12-31", "2024-05-01T10:00:00.1234567", "1500-01-01", "", "no date"]
    alone = [dates.seconds([text], dates.ISO)[0] for text in texts]
    np.testing.assert_array_equal(dates.seconds(texts, dates.ISO), alone)
    assert np.isfinite(alone[:3]).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"types": {"city": "colour"}}, "the type of 'city' must be number, category, date"),
        ({"types": {"y": "category"}}, "types are those of features, but 'y' is none"),
        ({"target_log": True}, "target_log is for a number to predict"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TableData.model_validate({"kind": "table", "source": "t.csv", "target": "y", **settings})


def test_a_target_can_be_learned_as_its_logarithm(tmp_path: Path) -> None:
    amounts = np.random.default_rng(1).lognormal(8, 2, N)
    dataset = load(tmp_path, rows(y=amounts), task="regression", target_log=True)
    fitted = dataset.preprocess
    scaled = fitted.scaled_target(dataset.train.y)
    assert (scaled.mean(), scaled.std()) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert fitted.target_values(scaled) == pytest.approx(dataset.train.y)
    fitted.save(tmp_path)
    assert Preprocess.load(tmp_path).target_values(scaled) == pytest.approx(dataset.train.y)
    task = task_of(dataset)
    perfect = torch.from_numpy(fitted.scaled_target(dataset.test.y)).float()[:, None]
    assert task.loss(perfect, torch.from_numpy(dataset.test.y)) < 1e-10
    assert task.measure(task.answers(perfect, dataset.test), dataset.test)["loss"] < 1e-10


def test_class_weights_make_classes_cost_the_same(tmp_path: Path) -> None:
    dataset = load(tmp_path, rows())
    y = torch.from_numpy(dataset.train.y)
    outputs = torch.zeros(len(y), 2)
    plain, balanced = task_of(dataset), task_of(dataset, "balanced")
    assert balanced.loss(outputs, y).item() == pytest.approx(plain.loss(outputs, y).item())
    each = [float(balanced.loss(outputs[y == c], y[y == c]) * (y == c).sum()) for c in (0, 1)]
    assert each[0] == pytest.approx(each[1])
    named = task_of(dataset, {"yes": 3.0})
    ratio = named.loss(outputs[y == 1], y[y == 1]) / named.loss(outputs[y == 0], y[y == 0])
    assert ratio.item() == pytest.approx(3.0)
    with pytest.raises(ExperimentError, match="no class 'yess', did you mean 'yes'"):
        task_of(dataset, {"yess": 3.0})


def test_preprocessing_is_the_same_after_a_round_through_its_files(tmp_path: Path) -> None:
    frame = rows()
    frame.loc[::5, "income"] = np.nan
    dataset = load(tmp_path, frame, preprocess={"missing": "median", "scale": "quantile"})
    dataset.preprocess.save(tmp_path)
    again = Preprocess.load(tmp_path)
    assert np.array_equal(again.apply(dataset.test_columns), dataset.test.x)


def test_files_of_format_1_are_still_read(tmp_path: Path) -> None:
    old = {"shape": [], "resized": False, "low": None, "high": None, "longest": None}
    columns = [
        {"name": "age", "kind": "number", "categories": [], **old},
        {"name": "city", "kind": "category", "categories": ["Bonn", "Rom"], **old},
        {"name": "pay", "kind": "number", "categories": [], **old},
    ]
    target = {"mean": 0.0, "deviation": 1.0}
    value = {"format": 1, "missing": "median", "columns": columns, "target": target}
    (tmp_path / "preprocess.json").write_text(json.dumps(value))
    numbers = {"median": [30, 7], "mean": [40, 5], "scale": [0.1, 2]}
    tensors = {name: np.array(v, np.float32) for name, v in numbers.items()}
    save_file(tensors, tmp_path / "preprocess.safetensors")
    x = Preprocess.load(tmp_path).apply(
        {"age": [50.0, np.nan], "city": ["Rom", "Ur"], "pay": [6.0, np.nan]}
    )
    assert x == pytest.approx(np.array([[1, 0, 1, 2], [-1, 0, 0, 4]]))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (rows(empty=None), r"'empty' has no finite number in any of \d+ training rows.*drop"),
        (
            rows(mixed=[*map(str, range(N - 2)), "n. a.", "?"]),
            "'mixed' mixes numbers and texts: 2 of 240 values are no numbers, the first is "
            r"'n. a.' in row 238",
        ),
        (rows(y="no"), "all labels are 'no'; there is nothing to learn"),
        (rows(y=["no"] * (N - 1) + ["yes"]), "label 'yes' has one sample, and a class needs two"),
    ],
)
def test_columns_that_cannot_be_used_are_named(
    tmp_path: Path, frame: pd.DataFrame, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path, frame)


def test_a_constant_column_is_told(tmp_path: Path) -> None:
    dataset = load(tmp_path, rows(one=1, name="x"))
    assert any("of no use: one, name (data.drop)" in note for note in dataset.notes)


def test_a_version_takes_gaps_and_dates_as_it_was_trained(tmp_path: Path) -> None:
    frame = rows()
    frame.loc[::5, "income"] = np.nan
    dataset = load(tmp_path, frame, preprocess={"missing": "median", "scale": "quantile"})
    runtime = apps.version(tmp_path / "v", dataset, Model(name="table_resnet", width=8), "t")
    row = {"income": None, "city": "Rom", "joined": "2020-05-01", "member": True}
    sent = [row, row | {"income": float("nan")}, row | {"city": None}, row | {"joined": None}]
    answers = runtime.predict(sent)
    assert answers[0] == answers[1]
    assert answers[0] != answers[3]
    columns = columns_of(runtime.schema, [row, row | {"city": None}])
    assert columns["city"].tolist() == ["Rom", ""]
    assert 0 < runtime.predict([row | {"joined": "9999-12-31"}])[0].probabilities["yes"] < 1
    for wrong in ("May 2020", 20200501, "2020-W18-5"):
        with pytest.raises(RowsError, match="'joined': must be a date such as 2024-01-31"):
            columns_of(runtime.schema, [row | {"joined": wrong}])


def test_an_exported_table_resnet_takes_any_number_of_rows(tmp_path: Path) -> None:
    dataset = load(tmp_path, rows())
    facts = dataset.preprocess.facts
    assert facts["columns"] == (1, 3, 1, 2, 2, 1)
    module = models.build(
        Model(name="table_resnet"), dataset.preprocess.input_shape, 2, facts
    ).eval()
    with torch.no_grad():
        whole = module(torch.from_numpy(dataset.train.x))
        alone = module(torch.from_numpy(dataset.train.x[:1]))
    assert torch.allclose(whole[:1], alone, atol=1e-5)
    with pytest.raises(ExperimentError, match="table_resnet takes tables only"):
        models.build(Model(name="table_resnet"), (4,), 2)


# --- many rows -----------------------------------------------------------------------------------


def test_rows_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(tmp_path, rows())
    assert small.train.x.base is None, "in memory"
    monkeypatch.setattr(room, "MAPPED", 1)
    large = load(tmp_path, rows())
    assert isinstance(large.train.x.base, np.memmap)
    for part in ("train", "validation", "test"):
        assert getattr(large, part).x.tobytes() == getattr(small, part).x.tobytes()
    assert (large.digest, large.notes) == (small.digest, small.notes)


def test_a_disk_without_room_for_the_rows_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "MAPPED", 1)
    monkeypatch.setattr(room.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="GB of rows .No space left.*set TMPDIR"):
        load(tmp_path, rows())
