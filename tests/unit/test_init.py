"""``lepton-ray init``: what it guesses from data, and that a plan takes what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes

from lepton_ray import cli, data
from lepton_ray.config import load, loads, render
from lepton_ray.config.schema import TableData, Train
from lepton_ray.errors import DataError, InputError
from lepton_ray.jobs.planning import make_plan
from lepton_ray.pipeline import guess
from lepton_ray.pipeline.guesses import Guess
from lepton_ray.pipeline.init import init
from lepton_ray.terminal import Silent
from tests import apps, stores

TABLE = {"kind": "table", "model": "table_resnet"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stores.new(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def home(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(source: str, **options: Any) -> dict[str, Any]:
    asked = {"output": None, "target": None, "force": False, "terminal": Silent(), **options}
    return init(source, **asked)


def guessed(frame: pd.DataFrame, target: str | None = None) -> dict[str, Any]:
    return {g.path.removeprefix("data."): g.value for g in guess.rows("t", frame, target)}


# --- a plan takes it -----------------------------------------------------------------------------


def cancer(home: Path) -> str:
    loaded = load_breast_cancer(as_frame=True)
    frame = loaded.data.assign(diagnosis=loaded.target_names[loaded.target])
    frame.insert(0, "id", range(7000, 7000 + len(frame)))
    frame.to_csv(home / "Breast Cancer.csv", index=False)
    return "Breast Cancer.csv"


def reviews(home: Path) -> str:
    frame = pd.read_csv(apps.write_reviews(home / "r.csv", 240))
    frame.to_json(home / "reviews.jsonl", orient="records", lines=True)
    return "reviews.jsonl"


def diabetes(home: Path) -> str:
    frame = load_diabetes(as_frame=True).frame.rename(columns={"target": "progression"})
    frame.loc[3:9, "bmi"] = np.nan
    frame.to_parquet(home / "diabetes.parquet")
    return "diabetes.parquet"


def photos(home: Path) -> str:
    for number in range(120):
        values = np.random.default_rng(number).integers(0, 200, (90, 60, 3), np.uint8)
        values[..., number % 2] += 50
        path = home / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return "photos"


def arrays(home: Path) -> str:
    x = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    y = np.arange(200) % 10
    np.savez(home / "a.npz", x_train=x[:150], y_train=y[:150], x_test=x[150:], y_test=y[150:])
    return "a.npz"


def idx(home: Path) -> str:
    """The four files of MNIST: magic, sizes, then bytes."""
    rng = np.random.default_rng(0)
    for stem, n in (("train", 200), ("t10k", 50)):
        parts = {
            "images-idx3": rng.integers(0, 256, (n, 6, 6), np.uint8),
            "labels-idx1": np.arange(n, dtype=np.uint8) % 5,
        }
        for kind, values in parts.items():
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            (home / "idx").mkdir(exist_ok=True)
            (home / "idx" / f"{stem}-{kind}-ubyte").write_bytes(content)
    return "idx"


def comments(home: Path) -> str:
    frame = pd.read_csv(apps.write_reviews(home / "r.csv", 240)).drop(columns=["mood", "part"])
    labels = {word: frame.text.str.contains(word).astype(int) for word in ("lovely", "film")}
    frame.assign(id=[f"c{n}" for n in range(240)], **labels).to_csv("comments.csv", index=False)
    return "comments.csv"


def films(home: Path) -> str:
    rng = np.random.default_rng(0)
    genres = [[g for g in ("comedy", "drama", "war") if rng.random() < 0.4] for _ in range(300)]
    frame = pd.DataFrame({"minutes": rng.normal(100, 20, 300), "genres": map("|".join, genres)})
    frame.to_csv("films.csv", index=False)
    return "films.csv"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            comments,
            {
                "kind": "text",
                "target": ("lovely", "film"),
                "model": "text_bag",
                "metric": "average_precision",
            },
        ),
        (films, {"kind": "table", "target": "genres", "metric": "average_precision"}),
        (
            cancer,
            {"kind": "table", "target": "diagnosis", "model": "table_resnet", "metric": "accuracy"},
        ),
        (reviews, {"kind": "text", "target": "mood", "model": "text_bag", "metric": "accuracy"}),
        (
            diabetes,
            {"kind": "table", "target": "progression", "model": "table_resnet", "metric": "mae"},
        ),
        (photos, {"kind": "image", "model": "cnn", "metric": "accuracy"}),
        (arrays, {"kind": "image", "model": "cnn", "metric": "accuracy"}),
        (idx, {"kind": "image", "model": "cnn", "metric": "accuracy"}),
    ],
)
def test_a_plan_takes_what_is_written(home: Path, make: Any, expected: dict) -> None:
    done = written(make(home))
    experiment = load(done["file"])
    found = {
        "kind": experiment.data.kind,
        "target": getattr(experiment.data, "target", None),
        "model": experiment.model.name,
        "metric": experiment.gate.metric,
    }
    assert {k: v for k, v in found.items() if k in expected} == expected
    plan, _ = make_plan(experiment)
    assert plan.steps >= 100
    assert done["next"] == f"lepton-ray run {done['file']}"


def test_every_guess_is_in_the_file_with_its_reason(home: Path) -> None:
    done = written(cancer(home))
    text = Path(done["file"]).read_text()
    assert done["file"] == "breast-cancer.yaml"
    assert "  drop: [id]  # guessed: id: an id: 569 distinct whole numbers\n" in text
    assert "  metric: accuracy  # guessed: 2 classes, 37 % of the samples are 'malignant'\n" in text
    given = {"name", "data.source"}
    assert {g["path"] for g in done["guesses"] if not g["reason"]} <= given


def test_the_given_splits_are_kept(home: Path) -> None:
    experiment = load(written(reviews(home))["file"])
    assert (experiment.data.split.test, experiment.data.split.column) == ("given", "part")
    assert load(written(arrays(home))["file"]).data.split.test == "given"


def test_pictures_are_taken_at_the_size_that_is_written(home: Path) -> None:
    read = load(written(photos(home))["file"]).data
    assert read.kind == "image"
    assert (read.preprocess.size, read.preprocess.color) == ((64, 43), "rgb")


# --- the rules -----------------------------------------------------------------------------------


def table(n: int = 60, **columns: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), **columns})


def test_the_target_is_known_by_its_name_else_the_last_that_can_be() -> None:
    classes = ["p", "q"] * 30
    assert guessed(table(Label=classes, c=classes))["target"] == "Label"
    assert guessed(table(c=classes, kind=classes))["target"] == "kind"
    names = [f"person {i}" for i in range(60)]
    assert guessed(table(c=classes, name=names))["target"] == "c"
    assert guessed(table(Label=classes, c=classes), "c")["target"] == "c"


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["p", "q"] * 30, "classification"),
        ([True, False] * 30, "classification"),
        ([0, 1, 2] * 20, "classification"),
        ([1.0, 2.0] * 30, "classification"),
        ([0.5, 1.5] * 30, "regression"),
        (list(range(0, 120, 2)), "regression"),
    ],
)
def test_classes_are_texts_or_few_whole_numbers(values: list, task: str) -> None:
    assert guessed(table(y=values))["task"] == task


def test_several_labels_are_told_by_names_and_cells() -> None:
    one, two = [0, 1] * 30, [True, False, False] * 20
    cells = ["x;y", "y", "x", ""] * 15
    named = guessed(table(label_red=one, label_big=two))
    assert named["target"] == ["label_red", "label_big"]
    assert "task" not in named
    assert guessed(table(red=one, big=two), "red,big")["target"] == ["red", "big"]
    found = guessed(table(tags=cells))
    assert (found["target"], found["separator"]) == ("tags", ";")
    assert guessed(table(c=cells), "c")["separator"] == ";"
    lists = guessed(table(tags=[["x"], ["x", "y"], []] * 20))
    assert (lists["target"], "separator" in lists) == ("tags", False)


@pytest.mark.parametrize(
    "columns",
    [
        {"category": ["Rom, Italy", "Bonn, Germany", "Köln, Germany"] * 20},
        {"is_open": [0, 1] * 30, "y": ["p", "q", "r"] * 20},
        {"smoker": [0, 1] * 30, "ill": [0, 0, 1] * 20},
        {"label_a": [0, 1] * 30, "label": ["p", "q", "r"] * 20},
        {"tags": ["x", "y", "z"] * 20},
    ],
)
def test_what_is_not_evident_is_one_class(columns: dict) -> None:
    found = guessed(table(**columns))
    assert found["target"] == list(columns)[-1]
    assert "separator" not in found


def test_columns_that_tell_nothing_are_dropped() -> None:
    n = 60
    frame = table(
        customer_id=np.random.default_rng(0).permutation(n) + 500,
        row=range(n),
        code=[f"k{i}" for i in range(n)],
        same=[1] * n,
        nothing=[None] * n,
        tags=[["x"]] * n,
        age=np.random.default_rng(1).permutation(n) + 20,
        city=["Bonn", "Rom", "Oslo"] * 20,
        y=["p", "q"] * 30,
    )
    found = guessed(frame)
    assert found["drop"] == ["customer_id", "row", "code", "same", "nothing", "tags"]
    assert found["kind"] == "table"


def test_free_texts_are_read_for_classes_and_left_out_for_a_number() -> None:
    texts = [f"a rather long text of number {i}" for i in range(60)]
    found = guessed(table(words=texts, y=["p", "q"] * 30))
    assert (found["kind"], found["text"]) == ("text", "words")
    found = guessed(table(words=texts, y=np.linspace(0, 1, 60)))
    assert (found["kind"], found["drop"]) == ("table", ["words"])


def test_gaps_in_numbers_become_the_median() -> None:
    assert "preprocess.missing" not in guessed(table(y=["p", "q"] * 30))
    frame = table(y=["p", "q"] * 30)
    frame.loc[3, "a"] = np.nan
    assert guessed(frame)["preprocess.missing"] == "median"


@pytest.mark.parametrize(
    ("rare", "metric", "said"), [(90, "accuracy", "30 %"), (30, "auc", "9.9 %")]
)
def test_rare_classes_are_not_measured_by_accuracy(
    home: Path, rare: int, metric: str, said: str
) -> None:
    y = np.arange(300) < rare
    table(300, y=np.where(y, "yes", "no")).to_csv("t.csv", index=False)
    done = written("t.csv")
    assert load(done["file"]).gate.metric == metric
    (reason,) = [g["reason"] for g in done["guesses"] if g["path"] == "gate.metric"]
    assert f"{said} of the samples are 'yes'" in reason
    make_plan(load(done["file"]))


def test_several_rare_classes_are_measured_by_f1(home: Path) -> None:
    table(300, y=["p"] * 180 + ["q"] * 90 + ["r"] * 30).to_csv("t.csv", index=False)
    assert load(written("t.csv")["file"]).gate.metric == "f1_macro"


def test_any_number_of_samples_has_a_batch_that_shards_divide() -> None:
    for n in [8, 9, 31, 100, 1000, 5000, 10**6]:
        batch = guess._batch(n)
        assert batch <= n
        assert batch % Train(batch=batch).n_shards == 0
    with pytest.raises(DataError, match="needs at least 8 samples, but has 7"):
        guess._batch(7)


def test_any_name_of_a_column_survives_the_file() -> None:
    hostile = ["a: b", "yes", "# x", "'", "{", "null", "two\nlines", "Größe", "- z", "1e5", "07"]
    guesses = [
        Guess("name", "t"),
        Guess("data.kind", "table", "because\nof # this"),
        Guess("data.source", "t: #.csv"),
        Guess("data.target", hostile[0]),
        Guess("data.drop", hostile[1:], "; ".join(hostile)),
        Guess("model.name", "mlp"),
    ]
    data = loads(guess.render(guesses, "from\nsomewhere")).data
    assert data.kind == "table"
    assert (data.source, data.target, list(data.drop)) == ("t: #.csv", hostile[0], hostile[1:])
    experiment = loads(guess.render(guesses, "")).model_copy(update={"data": data})
    assert loads(render(experiment)) == experiment


# --- wrong input ---------------------------------------------------------------------------------


def test_a_file_is_overwritten_only_when_asked(home: Path) -> None:
    table(y=["p", "q"] * 30).to_csv("t.csv", index=False)
    Path("t.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"t\.yaml exists: --force overwrites it, -o FILE names"):
        written("t.csv")
    assert Path("t.yaml").read_text() == "mine"
    assert written("t.csv", output="u.yaml")["file"] == "u.yaml"
    written("t.csv", force=True)
    assert load("t.yaml").name == "t"
    with pytest.raises(InputError, match="cannot be written: .*: name another with -o"):
        written("t.csv", output="none/u.yaml")


def test_data_that_cannot_be_used_are_told(home: Path) -> None:
    Path("empty.csv").write_text("")
    Path("head.csv").write_text("a,b\n")
    Path("one.csv").write_text("a\n1\n2\n")
    Path("t.xlsx").write_text("x")
    Path("folder").mkdir()
    Path("folder/rows.csv").write_text("a,b\n1,2\n")
    table(y=["p", "q"] * 30, tags=[["x"]] * 60).to_json("t.jsonl", orient="records", lines=True)
    photos(home)
    for source, target, said in [
        ("none.csv", None, "'none.csv' does not exist"),
        ("empty.csv", None, "empty.csv: is empty: a CSV starts with a line"),
        ("head.csv", None, "has 0 rows and 2 columns"),
        ("one.csv", None, "has 2 rows and 1 columns"),
        ("t.xlsx", None, "t.xlsx: must be a folder of pictures .*IDX.* .npz, .csv, .parquet, .jso"),
        ("folder", None, "must be .*; but it is a folder that holds rows.csv"),
        ("t.jsonl", "z", r"no column 'z', known: a, b, tags, y"),
        ("t.jsonl", "tag", "no column 'tag', did you mean 'tags'"),
        ("t.jsonl", "tags", r"'tags' cannot be predicted \(lists or objects\)"),
        ("photos", "y", "--target names a column, but photos holds images"),
    ]:
        with pytest.raises(InputError, match=said):
            written(source, target=target)
    assert not list(home.glob("*.yaml")), "nothing was written"


def test_the_command_prints_a_table_or_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(y=["p", "q"] * 30).to_csv("t.csv", index=False)
    assert cli.main(["init", "t.csv"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("init   t.yaml\n  data.kind ")
    assert out.endswith("next   lepton-ray run t.yaml\n")
    assert cli.main(["init", "t.csv", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "InputError"
    assert cli.main(["init", "t.csv", "-o", "u.yaml", "--target", "a", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"path": "data.target", "value": "a", "reason": "as asked"} in result["guesses"]


def test_a_table_s_dates_groups_codes_and_rare_classes_are_seen() -> None:
    n = 2000
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "patient_id": np.repeat(np.arange(n // 4), 4),
            "zip": rng.integers(10_000, 10_050, n),
            "admitted": pd.date_range("2020-01-01", periods=n).strftime("%Y-%m-%d"),
            "pressure": rng.normal(120, 15, n),
            "ward": rng.choice(["a", "b", "c"], n),
            "outcome": np.where(np.arange(n) % 20 == 0, "died", "lived"),
        }
    )
    found = {made.path: made.value for made in guess.rows("stays.csv", frame)}
    assert found["data.split.group"] == "patient_id"
    assert found["data.types"] == {"zip": "category"}
    assert (found["data.preprocess.scale"], found["data.preprocess.rare"]) == ("quantile", 10)
    assert "data.drop" not in found
    alone = {
        made.path: made.value for made in guess.rows("s.csv", frame.drop(columns="patient_id"))
    }
    assert alone["data.split.time"] == "admitted"
    mixed = frame.drop(columns="patient_id").sample(frac=1, random_state=0)
    assert "data.split.time" not in {made.path for made in guess.rows("s.csv", mixed)}


def test_rare_classes_get_weights_and_a_threshold(tmp_path: Path) -> None:
    n = 1000
    label = np.where(np.arange(n) % 20 == 0, "bad", "good")
    frame = pd.DataFrame({"a": np.random.default_rng(0).normal(0, 1, n), "y": label})
    frame.to_csv(tmp_path / "loans.csv", index=False)
    section = {"kind": "table", "source": str(tmp_path / "loans.csv"), "target": "y"}
    dataset = data.load(TableData.model_validate(section))
    found = {made.path: made.value for made in guess.training(dataset)}
    assert found["train.class_weights"] == "balanced"
    assert (found["evaluate.calibrate"], found["evaluate.threshold"]) == ("platt", "f1_macro")
    written = guess.render([Guess("name", "a"), *_settings(section), *guess.training(dataset)], "t")
    assert loads(written).evaluate.calibrate == "platt"


def _settings(section: dict) -> list[Guess]:
    return [Guess(f"data.{name}", value) for name, value in section.items()]


def test_interactions_and_series_are_told_by_their_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame(
        {
            "user_id": rng.integers(0, 30, 500),
            "movie_id": rng.integers(0, 20, 500),
            "rating": rng.integers(1, 6, 500),
            "timestamp": np.arange(500),
        }
    )
    made = {g.path: g.value for g in guess.rows("r.csv", ratings)}
    assert made["data.kind"] == "interactions"
    assert (made["data.user"], made["data.item"]) == ("user_id", "movie_id")
    assert (made["data.rating"], made["data.task"]) == ("rating", "rating")
    liked = {g.path: g.value for g in guess.rows("r.csv", ratings.drop(columns="rating"))}
    assert liked["data.task"] == "ranking"
    times = pd.date_range("2024-01-01", periods=400, freq="h").delete(77)
    hourly = pd.DataFrame({"time": times.astype(str), "volume": np.arange(399.0), "rain": 1.0})
    made = {g.path: g.value for g in guess.rows("s.csv", hourly)}
    assert (made["data.kind"], made["data.target"]) == ("series", "volume")
    assert made["data.preprocess.gaps"] == "mask"
    assert made["data.covariates.past"] == ["rain"]
    two = pd.concat([hourly.assign(road="A"), hourly.assign(road="B")])
    assert {g.path: g.value for g in guess.rows("s.csv", two)}["data.id"] == "road"
    for name, frame in (("r", ratings), ("l", ratings.drop(columns="rating")), ("s", hourly)):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        file = tmp_path / f"{name}.yaml"
        init(
            str(tmp_path / f"{name}.csv"),
            output=str(file),
            target=None,
            force=False,
            terminal=Silent(),
        )
        written = load(file)
        assert written.model.name in ("matrix_factorization", "nbeats")
        assert written.tune is not None
        assert written.tune.metric in ("val_rmse", "val_ndcg", "val_mae")
