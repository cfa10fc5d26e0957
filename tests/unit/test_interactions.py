"""Interactions: from a file to ratings and rankings, a version and an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lepton_ray import data, models
from lepton_ray.config import render, validate
from lepton_ray.config.load import loads
from lepton_ray.config.schema import Experiment, InteractionData, Model
from lepton_ray.data.interactions.fit import InteractionFit
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.pipeline import checks
from lepton_ray.serving.requests import RowsError
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.signature import signature
from lepton_ray.training import baselines, rankings
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from tests import apps
from tests.elastic import Generation, Kill, train

USERS, ITEMS = 40, 30


def frame(seed: int = 0) -> pd.DataFrame:
    """Two kinds of people and two kinds of items: each likes its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        for item in rng.permutation(ITEMS)[:16]:
            likes = user % 2 == item % 2
            rating = float(np.clip(rng.normal(4.2 if likes else 1.8, 0.4), 1, 5))
            rows.append((f"u{user}", int(item), round(rating, 2)))
    made = pd.DataFrame(rows, columns=["who", "what", "stars"])
    made["at"] = rng.permutation(len(made))
    made["age"] = made.who.str[1:].astype(int) % 2 * 30.0 + 20
    made["genre"] = np.where(made.what % 2 == 0, "comedy", "drama")
    return made


def taken(made: pd.DataFrame) -> pd.DataFrame:
    """What each one liked."""
    return made[made.stars > 3].drop(columns="stars")


def section(path: Path, **settings: Any) -> dict[str, Any]:
    found = {"kind": "interactions", "source": str(path), "user": "who", "item": "what"}
    if settings.get("task") != "ranking":
        found["rating"] = "stars"
    return {**found, **settings}


def load(path: Path, made: pd.DataFrame | None = None, **settings: Any) -> data.Dataset:
    (frame() if made is None else made).to_csv(path, index=False)
    return data.load(InteractionData.model_validate(section(path, **settings)))


def experiment(path: Path, model: str, **settings: Any) -> Experiment:
    return validate(
        {
            "name": "likes",
            "data": section(path, **settings),
            "model": {"name": model, "width": 8},
            "train": {
                "epochs": 2,
                "batch": 64,
                "shards": 4,
                "optimizer": {"name": "adamw", "lr": 0.01},
                "digest_every": 2,
            },
            "gate": {"metric": "ndcg" if settings.get("task") == "ranking" else "rmse"},
        }
    )


FEATURES = {"user": ["age"], "item": ["genre"]}

# --- sources and splits --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_ids_are_texts_whatever_the_file(tmp_path: Path, suffix: str) -> None:
    path, made = tmp_path / f"r{suffix}", frame()
    if suffix == ".csv":
        made.to_csv(path, index=False)
    elif suffix == ".parquet":
        made.to_parquet(path)
    else:
        made.to_json(path, orient="records", lines=True)
    dataset = data.load(InteractionData.model_validate(section(path)))
    assert set(dataset.preprocess.columns[1].categories) <= {str(i) for i in range(ITEMS)}
    assert dataset.digest == load(tmp_path / "other.csv", made).digest


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"stars": "good"}, {}, "ratings in 'stars' are not numbers, the first is 'good' in row 0"),
        ({"stars": np.inf}, {}, "are not numbers, the first is inf in row 0"),
        ({"stars": None}, {}, "1 of 640 ratings in 'stars' are not numbers"),
        ({"who": None}, {}, "1 of 640 rows have no 'who', the first is row 0: fill or drop them"),
        ({"at": "soon"}, {"time": "at"}, "neither numbers nor dates, the first is 'soon' in row 0"),
        ({}, {"item": "waht"}, "no column 'waht', did you mean 'what'"),
        ({}, {"features": {"user": ["wage"]}}, "no column 'wage', did you mean 'age'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    made = frame().astype(dict.fromkeys(change, object))
    for name, value in change.items():
        made.loc[0, name] = value
    with pytest.raises(DataError, match=said):
        load(tmp_path / "r.csv", made, **settings)


def test_ratings_that_are_all_the_same_are_for_a_ranking(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every 'stars' is 1; .* set data.task: ranking"):
        load(tmp_path / "r.csv", frame().assign(stars=1.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rating": None}, "task: rating needs the column to predict"),
        ({"split": {"by": "time"}}, "split.by: time needs times"),
        ({"time": "at", "split": {"by": "last", "test": 0.5}}, "by: last takes one item of each"),
        ({"user": "what"}, "user and item must be two columns, but both are 'what'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        InteractionData.model_validate({**section(tmp_path / "r.csv"), **settings})


def test_the_last_of_each_user_tests_and_the_one_before_validates(tmp_path: Path) -> None:
    made = taken(frame())
    dataset = load(tmp_path / "r.csv", made, task="ranking", time="at")
    ordered = made.sort_values("at")
    known = set(dataset.schema.items)
    for part, place in ((dataset.test, -1), (dataset.validation, -2)):
        fitted = dataset.preprocess
        assert isinstance(fitted, InteractionFit)
        for row in range(len(part)):
            user = fitted.user.id.categories[int(part.x[row, 0]) - 1]
            item = str(ordered[ordered.who == user].what.iloc[place])
            assert item in known
            assert [dataset.schema.items[i] for i in np.flatnonzero(part.y[row] == 1)] == [item]


def test_of_repeated_interactions_the_latest_counts(tmp_path: Path) -> None:
    """Also in a file whose newest rows come first."""
    made = taken(frame())
    older = made.assign(at=made["at"] - 1000)
    for number, both in enumerate([[made, older], [older, made]]):
        dataset = load(tmp_path / f"{number}.csv", pd.concat(both), task="ranking", time="at")
        plain = load(tmp_path / "plain.csv", made, task="ranking", time="at")
        assert sorted(map(tuple, dataset.test.y)) == sorted(map(tuple, plain.test.y))


def test_dates_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    made = taken(frame())
    made["at"] = [f"{1 + n % 28:02}/02/2020" for n in range(len(made))]
    with pytest.raises(DataError, match=r"neither numbers nor dates.*write dates as 2024-01-31"):
        load(tmp_path / "r.csv", made, task="ranking", time="at")


def test_a_split_by_time_tests_the_latest(tmp_path: Path) -> None:
    made = frame()
    load(tmp_path / "r.csv", made, time="at", split={"by": "time"})
    dates = made.assign(at=pd.Timestamp("2020-01-01") + pd.to_timedelta(made["at"], unit="D"))
    numbers = load(tmp_path / "n.csv", made, time="at", split={"by": "time"})
    assert np.array_equal(
        numbers.test.y, load(tmp_path / "d.csv", dates, time="at", split={"by": "time"}).test.y
    )
    assert sorted(numbers.test.y) == sorted(made.nlargest(128, "at").stars)


# --- samples -------------------------------------------------------------------------------------


def test_negatives_are_a_function_of_the_key_and_never_what_was_taken(tmp_path: Path) -> None:
    dataset = load(tmp_path / "r.csv", taken(frame()), task="ranking", time="at", negatives=4)
    rows = np.arange(40)
    x, y = dataset.train.batch(rows, 7)
    assert x.shape == (40, 1 + 1 + 4)
    assert (y == 0).all(), "the item that was taken stands first"
    assert np.array_equal(dataset.train.batch(rows, 7)[0], x)
    assert not np.array_equal(dataset.train.batch(rows, 8)[0], x)
    had = {tuple(pair) for pair in dataset.train.x.tolist()}
    drawn = [(row[0], item) for row in x.tolist() for item in row[2:]]
    assert not had & set(drawn)
    assert {item for _, item in drawn} <= set(range(1, len(dataset.schema.items) + 1))


def test_ids_never_seen_are_number_zero_and_given_features_win(tmp_path: Path) -> None:
    dataset = load(tmp_path / "r.csv", features=FEATURES)
    fitted = dataset.preprocess
    known = fitted.apply({"who": ["u1"], "what": ["3"]})
    told = fitted.apply({"who": ["u1"], "what": ["3"], "age": [50.0], "genre": ["drama"]})
    assert np.array_equal(known, told), "what is known of an id is filled in"
    unknown = fitted.apply({"who": ["new", "new"], "what": ["x", "x"], "age": [None, 50.0]})
    assert unknown[0].tolist() == [0.0] * len(unknown[0])
    assert unknown[1, 0] == 0
    assert unknown[1, 1] == known[0, 1]


# --- metrics and baselines -----------------------------------------------------------------------


def test_recall_and_ndcg_by_hand() -> None:
    y = np.array([[1, 0, 0, -1], [0, 1, 1, 0]], np.int8)
    scores = np.array([[1.0, 3.0, 2.0, 9.0], [4.0, 3.0, 1.0, 2.0]])
    found = rankings.measure(scores, y, 2)
    # The first user's item is third of those it had not; the second finds one of two, at place 2.
    assert found["recall"] == pytest.approx((0 + 1 / 2) / 2)
    at_two = 1 / np.log2(3)
    assert found["ndcg"] == pytest.approx(at_two / (1 + at_two) / 2)
    assert rankings.measure(scores, y, 3)["recall"] == pytest.approx((1 + 1 / 2) / 2)
    first = -np.log(np.exp(1) / np.exp([1, 3, 2]).sum())
    second = -np.log(np.exp([3, 1]) / np.exp([4, 3, 1, 2]).sum()).mean()
    assert found["loss"] == pytest.approx((first + second) / 2)


def test_every_model_and_the_strong_baseline_beat_the_trivial_one(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    dataset = load(path, features=FEATURES)
    measured = baselines.measure(dataset, 0)
    assert measured["linear"]["rmse"] < measured["baseline"]["rmse"] + 0.1
    for model in ("matrix_factorization", "two_tower"):
        made = validate(
            {
                **experiment(path, model, features=FEATURES).model_dump(mode="json"),
                "train": {"epochs": 12, "batch": 32, "optimizer": {"name": "adamw", "lr": 0.02}},
            }
        )
        *_, last = Replica(made, dataset).epochs()
        assert last["val_rmse"] < measured["baseline"]["rmse"] * 0.7, model
    liked = load(tmp_path / "l.csv", taken(frame()), task="ranking", time="at", top_k=5)
    measured = baselines.measure(liked, 0)
    assert measured["linear"]["ndcg"] > measured["baseline"]["ndcg"]
    made = validate(
        {
            **experiment(
                tmp_path / "l.csv", "matrix_factorization", task="ranking", time="at", top_k=5
            ).model_dump(mode="json"),
            "train": {"epochs": 12, "batch": 32, "optimizer": {"name": "adamw", "lr": 0.02}},
        }
    )
    *_, last = Replica(made, liked).epochs()
    assert last["val_ndcg"] > measured["baseline"]["ndcg"]


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("matrix_factorization", {"features": FEATURES}),
        ("two_tower", {"task": "ranking", "time": "at", "negatives": 5}),
    ],
)
def test_replicas_that_are_killed_do_not_change_a_byte(
    tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    made = frame() if "task" not in settings else taken(frame())
    made.to_csv(tmp_path / "r.csv", index=False)
    wanted = experiment(tmp_path / "r.csv", model, **settings)
    alone = train(wanted, [Generation(1)])
    killed = train(wanted, [Generation(3, Kill(1, 2, "start")), Generation(2)])
    assert (killed.sha256, killed.digest, killed.history) == (
        alone.sha256,
        alone.digest,
        alone.history,
    )


# --- versions and answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("ratings")
    dataset = load(folder / "r.csv", features=FEATURES)
    return apps.version(folder / "v", dataset, Model(name="two_tower", width=8), "stars")


@pytest.fixture(scope="module")
def likes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, data.Dataset]:
    folder = tmp_path_factory.mktemp("likes")
    features = {"item": ["genre"]}
    dataset = load(
        folder / "r.csv", taken(frame()), task="ranking", time="at", top_k=4, features=features
    )
    model = Model(name="matrix_factorization", width=8)
    return apps.version(folder / "v", dataset, model, "likes"), dataset


def test_a_rating_is_answered_for_known_and_for_new_ids(ratings: Runtime) -> None:
    rows = [
        {"who": "u1", "what": 3},
        {"who": "u1", "what": "3", "age": 50, "genre": "drama"},
        {"who": "nobody", "what": "nothing"},
        {"who": "nobody", "what": 3, "age": 20},
    ]
    same, told, new, aged = [a.value for a in ratings.predict(rows)]
    assert same == told
    assert new == ratings.predict([{"who": "x", "what": "y"}])[0].value, "one answer for all new"
    assert aged != new
    assert all(1 <= value <= 5 for value in (same, new, aged)), "in the range of training"
    app = apps.app(ratings)
    answered = app.post("/predict", json={"rows": rows}).json()["predictions"]
    assert [a["value"] for a in answered] == [same, told, new, aged]
    told = app.post("/predict", content="who,what\nu1,3\n", headers={"content-type": "text/csv"})
    assert told.json()["predictions"] == [{"value": same}]
    wrong = app.post("/predict", json={"rows": [{"who": 1.5, "what": None, "wage": 3}]})
    assert wrong.status_code == 422
    for said in ("must be an id: a text or a whole number", "no such field", '"field": "what"'):
        assert said in wrong.text
    with pytest.raises(
        RowsError, match="field 'age': must be a finite number, or null, but got 'old'"
    ):
        ratings.predict([{"who": "u1", "what": "3", "age": "old"}])


def test_a_ranking_lists_items_that_a_user_has_not_had(
    likes: tuple[Runtime, data.Dataset],
) -> None:
    runtime, dataset = likes
    made = taken(frame())
    app = apps.app(runtime)
    answered = app.post("/predict", json={"rows": [{"who": "u1"}, {"who": "new"}]}).json()
    known, new = answered["predictions"]
    assert len(known["items"]) == 4
    assert known["scores"] == sorted(known["scores"], reverse=True)
    whole = app.post("/predict?top_k=99", json={"rows": [{"who": "u1"}, {"who": "new"}]}).json()
    every, all_ = whole["predictions"]
    had = made[made.who == "u1"].sort_values("at").what.astype(str).tolist()[:-1]
    assert not set(had) & set(every["items"])
    assert len(every["items"]) == len(dataset.schema.items) - len(had)
    assert set(all_["items"]) == set(dataset.schema.items), "who is new may get anything"
    assert every["items"][:4] == known["items"]
    tensors = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [2], "data": ["u1", "new"]}]
    }
    v2 = app.post("/v2/models/likes/infer", json=tensors).json()["outputs"]
    assert [o["name"] for o in v2] == ["items", "scores"]
    assert v2[0]["data"] == known["items"] + new["items"]
    assert app.get("/v2/models/likes").json()["outputs"][0]["shape"] == [-1, -1]
    assert {c.name for c in signature(runtime.schema).outputs} == {"items", "scores"}


def test_a_version_is_scored_on_other_items_by_their_names(
    likes: tuple[Runtime, data.Dataset], tmp_path: Path
) -> None:
    runtime, dataset = likes
    fewer = taken(frame())
    fewer = fewer[~fewer.what.isin([1, 2])]
    other = load(tmp_path / "o.csv", fewer, task="ranking", time="at")
    assert set(other.schema.items) < set(dataset.schema.items)
    scored = checks.score(runtime, other)
    x = other.preprocess.apply({"who": other.test_columns["who"]})
    own = {item: place for place, item in enumerate(dataset.schema.items)}
    found = runtime.predict_columns(other.test_columns)[:, [own[i] for i in other.schema.items]]
    assert len(x) == len(found)
    assert scored == rankings.measure(found, other.test.y, 10)


def test_the_weights_do_not_depend_on_how_the_file_is_stored(tmp_path: Path) -> None:
    made = frame()
    made.to_parquet(tmp_path / "r.parquet")
    found = set()
    for path in (tmp_path / "r.csv", tmp_path / "r.parquet"):
        made.to_csv(tmp_path / "r.csv", index=False)
        wanted = experiment(path, "matrix_factorization")
        replica = Replica(wanted, data.load(wanted.data))
        list(replica.epochs())
        found.add(state_sha256(replica.state.final_weights()))
    assert len(found) == 1


def test_a_model_of_other_data_is_named(tmp_path: Path) -> None:
    dataset = load(tmp_path / "r.csv")
    with pytest.raises(ExperimentError, match="mlp takes no interactions .*: set one of matrix_f"):
        models.build(Model(name="mlp"), (2,), 1, dataset.preprocess.facts)
    with pytest.raises(ExperimentError, match="two_tower takes interactions only"):
        models.build(Model(name="two_tower"), (2,), 1)


def test_a_rendered_experiment_reads_back_equal(tmp_path: Path) -> None:
    made = experiment(tmp_path / "r.csv", "two_tower", task="ranking", time="at")
    assert loads(render(made)) == made


def test_all_items_and_candidates_are_scored_alike(tmp_path: Path) -> None:
    dataset = load(tmp_path / "r.csv", taken(frame()), task="ranking", time="at", features=FEATURES)
    for name in ("matrix_factorization", "two_tower"):
        model = models.build(
            Model(name=name), dataset.preprocess.input_shape, 0, dataset.preprocess.facts
        ).eval()
        x = torch.from_numpy(dataset.test.x[:3])
        some = torch.tensor([[1.0, 5.0]]).repeat(3, 1)
        torch.testing.assert_close(model(torch.cat([x, some], 1)), model(x)[:, [0, 4]])
