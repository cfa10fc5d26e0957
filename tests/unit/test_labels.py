"""Several labels a row: from their three forms to what is learned and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.datasets import load_digits

from lepton_ray import data
from lepton_ray.config import validate
from lepton_ray.config.schema import Evaluate, ImageData, Split, TableData, TextData
from lepton_ray.data import decision
from lepton_ray.data.dataset import Samples
from lepton_ray.data.split import check_labels, divide
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.training import baselines, metrics
from lepton_ray.training.tasks import task_of
from tests.elastic import Generation, train

RNG = np.random.default_rng(0)
GENRES = ["comedy", "drama", "NA"]  # a label may look like a missing cell


def films(n: int = 60) -> tuple[list[list[str]], pd.DataFrame]:
    """The labels of each film, and the film's other columns."""
    rng = np.random.default_rng(1)
    listed = [[g for g in GENRES if rng.random() < 0.4] for _ in range(n)]
    seconds = 60.0 * np.arange(n)
    title = [f"{' '.join(labels)} film {number}" for number, labels in enumerate(listed)]
    return listed, pd.DataFrame({"seconds": seconds, "title": title})


def as_columns(path: Path) -> dict[str, Any]:
    listed, frame = films()
    says = [["false", "True"], ["0", "1"]]
    for at, name in enumerate(GENRES):
        words = says[at % 2]
        frame[name] = [words[name in labels] for labels in listed]
    frame.to_csv(path / "films.csv", index=False)
    return {"source": str(path / "films.csv"), "target": ["NA", "comedy", "drama"]}


def as_cells(path: Path) -> dict[str, Any]:
    listed, frame = films()
    frame["genres"] = [" | ".join([*labels, *labels[:1]]) for labels in listed]
    frame.to_csv(path / "films.csv", index=False)
    return {"source": str(path / "films.csv"), "target": "genres", "separator": "|"}


def as_lists(path: Path) -> dict[str, Any]:
    listed, frame = films()
    frame["genres"] = listed
    frame.to_json(path / "films.jsonl", orient="records", lines=True)
    return {"source": str(path / "films.jsonl"), "target": "genres"}


def as_parquet(path: Path) -> dict[str, Any]:
    listed, frame = films()
    frame["genres"] = listed
    frame.to_parquet(path / "films.parquet")
    return {"source": str(path / "films.parquet"), "target": "genres"}


@pytest.mark.parametrize("form", [as_columns, as_cells, as_lists, as_parquet])
@pytest.mark.parametrize("kind", ["table", "text"])
def test_each_form_says_the_same(kind: str, form: Any, tmp_path: Path) -> None:
    section: dict[str, Any] = {"kind": kind, "split": {"test": 0.3}, **form(tmp_path)}
    if kind == "text":
        dataset = data.load(TextData.model_validate({**section, "text": "title"}))
    else:
        dataset = data.load(TableData.model_validate({**section, "drop": ["title"]}))
    assert (dataset.schema.task, dataset.schema.classes) == (
        "multilabel",
        ("NA", "comedy", "drama"),
    )
    assert [c.name for c in dataset.schema.columns] == ["title" if kind == "text" else "seconds"]
    listed, frame = films()
    column = dataset.schema.columns[0].name
    rows = dict(zip(frame[column], listed, strict=True))
    for value, y in zip(dataset.test_columns[column], dataset.test.y, strict=True):
        assert [name for name, has in zip(dataset.schema.classes, y, strict=True) if has] == sorted(
            rows[value]
        )
    assert len(dataset.test) == pytest.approx(18, abs=2)
    assert dataset.schema.answer == "any of 3 labels"


def test_the_names_of_labels_are_part_of_the_digest(tmp_path: Path) -> None:
    section = {"kind": "table", "drop": ["title"], **as_columns(tmp_path)}
    one = data.load(TableData.model_validate(section)).digest
    path = Path(section["source"])
    path.write_text(path.read_text().replace("comedy,", "farce,", 1))
    section["target"] = ["NA", "farce", "drama"]
    assert data.load(TableData.model_validate(section)).digest != one


ROWS = {"x": np.arange(40.0), "a": [0, 1] * 20, "b": [0, 0, 1, 1] * 10}


@pytest.mark.parametrize(
    ("changed", "settings", "said"),
    [
        (
            {"a": [0, 1] * 19 + [0, 2]},
            {},
            "says 0 or 1, false or true in every row, but 'a' says '2' in row 39: repair it",
        ),
        ({"a": [0, 1] * 19 + [0, None]}, {}, "'a' says nothing in row 39"),
        ({"b": [0] * 40}, {}, "no row has the label 'b', so there is nothing to learn of it"),
        ({"b": [True] * 40}, {}, "every row has the label 'b'"),
        ({}, {"target": ["a", "c"]}, "no column 'c'"),
        ({"t": ["p", ""] * 20}, {"target": "t", "separator": ";"}, r"there is \['p'\]: look at"),
        (
            {"t": [f"l{i};m{i}" for i in range(501)]},
            {"target": "t", "separator": ";"},
            "at most 1000 labels, but there are 1002: take the rare ones out",
        ),
        (
            {"t": [["p"], ["q"]] * 20},
            {"target": "t", "separator": ";"},
            "'t' holds lists, which need no separator: leave out data.separator",
        ),
        (
            {"t": [["p"], ["q"]] * 20},
            {"target": "t", "task": "regression"},
            "'t' holds lists of labels, but data.task is regression: leave it out",
        ),
        ({"t": [["p"], [3]] * 20}, {"target": "t"}, "that of 't' in row 1 holds 3: write it as a"),
        ({"t": [["p"], "q"] * 20}, {"target": "t"}, "lists of labels, but row 1 has 'q': write it"),
    ],
)
def test_what_is_wrong_with_labels_is_told(
    changed: dict, settings: dict, said: str, tmp_path: Path
) -> None:
    columns = ({"x": range(len(changed["t"]))} if "t" in changed else ROWS) | changed
    frame = pd.DataFrame(columns)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    section = {"kind": "table", "source": str(tmp_path / "t.jsonl"), "target": ["a", "b"]}
    with pytest.raises(DataError, match=said):
        data.load(TableData.model_validate({**section, **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": ["a"]}, r"a list of at least two columns of labels, but got \['a'\]"),
        ({"target": ["a", "b", "a"]}, "target names each column once, but has 'a' twice"),
        ({"target": ["a", "b"], "separator": "|"}, "but target lists 2: leave it out"),
        ({"target": "a", "separator": "|", "task": "regression"}, "but task is regression"),
        ({"target": ["a", "b"], "task": "regression"}, "several targets are for labels"),
        ({"target": ["a", "b"], "types": {"b": "number"}}, "but 'b' is none: take it out"),
        ({"target": ["a", "b"], "split": {"group": "b"}}, "must be two columns, but both are 'b'"),
    ],
)
def test_settings_that_do_not_fit_labels_are_refused(settings: dict, said: str) -> None:
    section = {"kind": "table", "source": "t.csv", **settings}
    with pytest.raises(ExperimentError, match=said):
        validate({"name": "t", "data": section, "model": {"name": "linear"}})


# --- split ---------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from([40, 200]))
def test_a_label_of_some_rows_is_on_both_sides(seed: int, labels: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((n, labels)) < rng.uniform(0.1, 0.9, labels)
    counts = truth.sum(axis=0)
    truth = truth[:, (counts >= 4) & (counts <= n - 4)]
    assume(truth.shape[1])
    parts = divide(truth, Split(test=0.2, validation=0.2, seed=seed), None)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(n))
    for part in ("train", "test"):
        counts = truth[parts[part]].sum(axis=0)
        assert (counts > 0).all()
        assert (counts < len(parts[part])).all()
    assert len(parts["test"]) == pytest.approx(0.2 * n, abs=labels + 1)


def test_a_split_is_drawn_again_until_labels_of_two_rows_are_on_both_sides() -> None:
    truth = np.zeros((40, 4), np.bool_)
    truth[::2, 0] = True
    for label, rows in enumerate([(1, 3), (5, 7), (1, 5)], 1):  # the last one beside two others
        truth[list(rows), label] = True
    for seed in range(12):
        parts = divide(truth, Split(test=0.3, seed=seed), None)
        assert truth[parts["test"]].any(axis=0).all()
        assert truth[parts["train"]].any(axis=0).all()


def test_a_label_of_one_row_is_learned_and_told_of() -> None:
    truth = np.zeros((50, 2), np.bool_)
    truth[:25, 0], truth[7, 1] = True, True
    parts = divide(truth, Split(), None)
    assert 7 in parts["train"]
    told = check_labels(["half", "once"], truth, parts)
    assert "test has no samples with and without 'once': they are not measured there" in told


def test_a_label_that_only_the_test_has_is_refused() -> None:
    truth = np.zeros((40, 2), np.bool_)
    truth[::2, 0], truth[30:35, 1] = True, True
    parts = divide(truth, Split(test=0.25, time="t"), None, times=np.arange(40.0))
    with pytest.raises(DataError, match="no sample of the training split has the label 'late'"):
        check_labels(["even", "late"], truth, parts)


def test_a_column_that_tells_a_label_is_told_of(tmp_path: Path) -> None:
    frame = pd.DataFrame({**ROWS, "code": [7, 9] * 20, "other": RNG.permutation([1, 2, 3, 4] * 10)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": ["a", "b"]}
    notes = data.load(TableData.model_validate(section)).notes
    told = [note for note in notes if "alone tells" in note]
    assert len(told) == 1
    assert "column 'code' alone tells a label in every training row" in told[0]


# --- learned and measured ------------------------------------------------------------------------


def test_metrics_are_scikit_learn_s_over_all_labels() -> None:
    y = RNG.integers(0, 2, (300, 4))
    p = (RNG.random((300, 4)) + y) / 2
    predicted = (p > 0.5).astype(int)
    found = metrics.labels(p, y)
    assert found == pytest.approx(
        {
            "loss": np.mean([reference.log_loss(y[:, i], p[:, i]) for i in range(4)]),
            "subset_accuracy": reference.accuracy_score(y, predicted),
            "f1_micro": reference.f1_score(y, predicted, average="micro"),
            "f1_macro": reference.f1_score(y, predicted, average="macro"),
            "average_precision": reference.average_precision_score(y, p, average="macro"),
            "auc": reference.roc_auc_score(y, p, average="macro"),
        }
    )
    assert found.keys() <= metrics.DIRECTIONS.keys()
    without = np.concatenate([y, np.zeros((300, 1), int)], axis=1)
    more = metrics.labels(np.concatenate([p, np.full((300, 1), 0.1)], axis=1), without)
    assert more["f1_macro"] == pytest.approx(found["f1_macro"]), "a label that none has"
    assert more["auc"] == pytest.approx(found["auc"])


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, and what is true of them."""
    digits = load_digits()
    n = digits.target
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    y = np.stack([n % 2 == 0, n > 4, np.isin(n, (0, 6, 8, 9))], axis=1)
    names = np.array(["even", "above four", "has a loop"])
    np.savez(path, x=digits.images.astype(np.float32), y=y.astype(np.int64), labels=names)
    return path


@pytest.fixture(scope="module")
def dataset(npz: Path) -> data.Dataset:
    return data.load(ImageData(kind="image", source=str(npz)))


def test_weights_make_missing_a_label_cost_more(dataset: data.Dataset) -> None:
    y = torch.from_numpy(dataset.train.y)
    shares = dataset.train.y.mean(axis=0)
    certain = torch.tensor([[0.0, 0.0, -9.0], [0.0, 0.0, 9.0]])
    for asked, times in (("balanced", (1 - shares[2]) / shares[2]), ({"has a loop": 5.0}, 5.0)):
        cost = task_of(dataset, asked).loss
        assert float(cost(torch.zeros(len(y), 3), y)) == pytest.approx(np.log(2)), "a mean of 1"
        others = [cost(torch.zeros(1, 3), torch.tensor([[0, 0, has]])) for has in (1, 0)]
        errors = [cost(certain[:1], torch.tensor([[0, 0, 1]]))]
        errors.append(cost(certain[1:], torch.tensor([[0, 0, 0]])))
        # What is left when the other two labels are taken away: 9 nats instead of log 2.
        missed, seen = (float(error - other) for error, other in zip(errors, others, strict=True))
        assert missed / seen == pytest.approx(times, rel=1e-3)
    with pytest.raises(ExperimentError, match="class_weights: no label 'loop'"):
        task_of(dataset, {"loop": 2.0})


def test_the_loss_over_shards_is_that_over_the_batch(dataset: data.Dataset) -> None:
    cost = task_of(dataset, "balanced").loss
    outputs, y = torch.randn(64, 3), torch.from_numpy(dataset.train.y[:64])
    parts = [cost(outputs[at : at + 16], y[at : at + 16]) for at in range(0, 64, 16)]
    assert float(sum(parts) / 4) == pytest.approx(float(cost(outputs, y)), rel=1e-6)


def test_the_measured_loss_is_the_learned_one(dataset: data.Dataset) -> None:
    task, some = task_of(dataset), Samples(x=dataset.test.x[:50], y=dataset.test.y[:50])
    outputs = torch.randn(50, 3)
    measured = task.measure(task.answers(outputs, some), some)["loss"]
    assert measured == pytest.approx(float(task.loss(outputs, torch.from_numpy(some.y))), rel=1e-5)


def test_baselines_are_worth_beating(dataset: data.Dataset) -> None:
    found = baselines.measure(dataset, seed=0)
    assert list(found) == ["baseline", "linear"]
    assert found["baseline"]["auc"] == 0.5
    assert found["linear"]["auc"] > 0.95
    assert found["linear"]["loss"] < found["baseline"]["loss"]
    shares = dataset.train.y.mean(axis=0)
    assert baselines.trivial(dataset)[0] == pytest.approx(shares)


def test_a_label_of_too_few_rows_does_not_stop_a_baseline(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": RNG.normal(size=80), "a": [0, 1] * 40, "b": [1] + [0] * 79})
    frame.to_csv(tmp_path / "t.csv", index=False)
    section = {"kind": "table", "source": str(tmp_path / "t.csv"), "target": ["a", "b"]}
    dataset = data.load(TableData.model_validate(section))
    found = baselines.measure(dataset, seed=0)
    assert list(found) == ["baseline", "linear", "boosting"]
    assert baselines.boosting(dataset, 0)[:, 1] == pytest.approx(dataset.train.y[:, 1].mean())


def test_each_label_has_its_own_threshold_and_scale() -> None:
    true = RNG.normal(-1.0, 2.0, (3000, 3))
    y = (RNG.random((3000, 3)) < 1 / (1 + np.exp(-true))).astype(np.int8)
    y[:, 2] = 0  # which no validation sample has
    logits = (true * [1.0, 4.0, 1.0]).astype(np.float32)
    asked = Evaluate(calibrate="temperature", threshold="f1")
    found = decision.fit_labels(logits, y, asked)
    assert found.scale == (pytest.approx(1, rel=0.1), pytest.approx(0.25, rel=0.1), 1.0)
    assert found.threshold[2] == 0.5
    p = found.probabilities(logits)
    chosen = found.chosen(p)
    for label in range(2):
        best = max(
            reference.f1_score(y[:, label], p[:, label] > t) for t in np.unique(p[:, label])[::9]
        )
        assert reference.f1_score(y[:, label], chosen[:, label]) >= best - 1e-9
    alone = np.concatenate([found.probabilities(logits[i : i + 1]) for i in range(50)])
    assert (alone == p[:50]).all(), "an answer does not depend on the rows beside it"
    extreme = found.probabilities(np.float32([[1e4, -1e4, 0], [np.nan, 0, 0]]))
    assert extreme[0].tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(extreme[1, 0])
    back = decision.from_json(dataset_schema(3), json.loads(json.dumps(vars(found))))
    assert back == found


def dataset_schema(labels: int) -> data.Schema:
    names = tuple(map(str, range(labels)))
    return data.Schema(columns=(), target="t", classes=names, task="multilabel")


def test_images_may_have_labels_without_names_but_of_0_and_1(npz: Path, tmp_path: Path) -> None:
    with np.load(npz) as file:
        x, y = file["x"], file["y"]
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    plain = data.load(ImageData(kind="image", source=str(tmp_path / "plain.npz")))
    assert plain.schema.classes == ("0", "1", "2")
    np.savez(tmp_path / "wrong.npz", x=x, y=y * 3)
    with pytest.raises(DataError, match="is 0 or 1 everywhere, but holds 3: repair it"):
        data.load(ImageData(kind="image", source=str(tmp_path / "wrong.npz")))
    np.savez(tmp_path / "names.npz", x=x, y=y, labels=np.array(["a"]))
    with pytest.raises(DataError, match="y has 3 columns of labels, but labels names 1"):
        data.load(ImageData(kind="image", source=str(tmp_path / "names.npz")))


def test_two_replicas_give_the_bytes_of_one(npz: Path) -> None:
    experiment = validate(
        {
            "name": "labels",
            "data": {"kind": "image", "source": str(npz), "split": {"test": 0.5}},
            "model": {"name": "cnn", "width": 8, "dropout": 0.1},
            "train": {
                "epochs": 4,
                "batch": 64,
                "shards": 4,
                "optimizer": {"name": "adamw", "lr": 0.01},
                "class_weights": "balanced",
                "digest_every": 2,
            },
        }
    )
    one, two = train(experiment, [Generation(1)]), train(experiment, [Generation(2)])
    assert two == one
    assert one.history[-1]["val_f1_macro"] > 0.85
    assert one.history[-1]["val_auc"] > 0.95
