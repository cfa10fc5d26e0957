"""Texts: from a file to words, a version and an answer."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray import data, models
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment, Model, Split, TextData
from lepton_ray.data import words
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.serving.requests import RowsError
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training import baselines
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from tests import apps
from tests.elastic import Generation, Kill, train

MOODS = ["good", "bad"] * 10


def load(path: Path, frame: pd.DataFrame | None = None, **settings: Any) -> data.Dataset:
    if frame is not None:
        frame.to_csv(path, index=False)
    section = {"kind": "text", "source": str(path), "text": "text", "target": "mood", **settings}
    return data.load(TextData.model_validate(section))


def frame(texts: list[Any], moods: list[str] = MOODS) -> pd.DataFrame:
    return pd.DataFrame({"text": (texts * len(moods))[: len(moods)], "mood": moods})


# --- words ---------------------------------------------------------------------------------------


def test_the_most_frequent_words_are_known_and_all_others_are_one() -> None:
    fitted = words.fit(["a a a b b", "a b c", "d"], 2, 9)
    assert fitted.get_vocab_size() == 4  # and the padding and the unknown word
    found = words.encode(fitted, ["A b, zebra", "", "b b b b b b b b"])
    assert found.dtype == np.int32
    known = found[0][[0, 1]].tolist()
    assert sorted(known) == [2, 3]
    assert found[0].tolist() == [*known, 1, 1, 0]  # the comma and the zebra
    assert found[1].tolist() == [0] * 5
    assert found[2].tolist() == [known[1]] * 5, "cut to the longest of the training split"


def test_a_text_cannot_spell_the_padding_or_the_unknown_word() -> None:
    fitted = words.fit(["a pad unk"], 9, 9)
    found = words.encode(fitted, ["[PAD] a [UNK]"])
    assert (words.counts(fitted, ["[PAD] a [UNK]"]) > 3).all(), "brackets and letters"
    assert found[0][0] == 1, "a bracket is an unknown word, not the end of the text"


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_has_numbers_of_words_below_the_vocabulary(texts: list[str]) -> None:
    fitted = words.fit(["the film is good", "the film is bad"], 3, 4)
    texts = [text for text in texts if not words.problem(text, 100)]
    found = words.encode(fitted, texts)
    assert found.shape == (len(texts), 4)
    assert ((found >= 0) & (found < fitted.get_vocab_size())).all()
    alone = [words.encode(fitted, [text])[0].tolist() for text in texts]
    assert found.tolist() == alone, "a text's numbers do not depend on its neighbours"


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_every_file_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    texts = ["007", "NA", "", 'two\nlines, "quoted"', "Çorum ﬁne"]
    made, path = frame(texts), tmp_path / f"t{suffix}"
    if suffix == ".csv":
        made.to_csv(path, index=False)
    elif suffix == ".parquet":
        made.to_parquet(path)
    else:
        made.to_json(path, orient="records", lines=True)
    dataset = load(path)
    assert set(dataset.test_columns["text"]) <= set(texts)
    other = load(tmp_path / "other.csv", frame(texts))
    assert dataset.digest == other.digest


def test_the_split_can_be_a_column(tmp_path: Path) -> None:
    source = apps.write_reviews(tmp_path / "t.csv")
    dataset = load(source, split={"test": "given", "column": "part"})
    assert len(dataset.test) == 40
    with pytest.raises(DataError, match="no column 'prat' to split by .*, did you mean 'part'"):
        load(source, split={"test": "given", "column": "prat"})
    made = frame(["fine film", "dull film"])
    made["part"] = ["train", "tset"] * 10
    with pytest.raises(DataError, match="must say train or test in every row, but it says 'tset'"):
        load(tmp_path / "o.csv", made, split={"test": "given", "column": "part"})
    with pytest.raises(ValueError, match="a split by column 'part' needs test: given"):
        Split(column="part")
    with pytest.raises(
        ValueError, match="target and split.column must be two columns, but both are 'mood'"
    ):
        load(source, split={"test": "given", "column": "mood"})


def test_words_are_of_the_training_split_only(tmp_path: Path) -> None:
    made = frame(["fine film", "dull film"])
    made["part"] = ["train"] * 18 + ["test"] * 2
    made.loc[18:, "text"] = "unheard"
    dataset = load(tmp_path / "t.csv", made, split={"test": "given", "column": "part"})
    assert dataset.preprocess.tokenizer is not None
    assert "unheard" not in dataset.preprocess.tokenizer.get_vocab()
    assert set(dataset.test.x.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["12", "7.5"], "column 'text' holds numbers and no texts, such as '12'"),
        (["", " "], "all 20 texts in column 'text' are empty"),
        (["x" * 31, "fine"], r"row 0 of column 'text' a text has at most 30 characters"),
    ],
)
def test_texts_that_are_none_are_refused(tmp_path: Path, texts: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path / "t.csv", frame(texts), preprocess={"characters": 30})


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'text', did you mean 'txt'"):
        load(tmp_path / "t.csv", frame(["a"]).rename(columns={"text": "txt"}))
    (tmp_path / "latin.csv").write_bytes("text,mood\nÇorum,good\n".encode("latin-1"))
    with pytest.raises(DataError, match="must be in UTF-8, but has byte 0xc7"):
        load(tmp_path / "latin.csv")
    with pytest.raises(
        ValueError, match="text and target must be two columns, but both are 'mood'"
    ):
        load(tmp_path / "t.csv", text="mood")
    with pytest.raises(DataError, match="all labels are 'good'"):
        load(tmp_path / "t.csv", frame(["a b"], ["good"] * 20))
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a", "mood": "bad"}\n\n{"text": "b", "mood": "good"\n')
    with pytest.raises(DataError, match="line 3 is not JSON: Expecting ',' delimiter"):
        load(lines)
    lines.write_text('["a", "bad"]\n')
    with pytest.raises(DataError, match="line 1 must be an object of columns, but is .'a', 'bad'"):
        load(lines)
    lines.write_text('{"text": "half \\ud83d", "mood": "bad"}\n')
    with pytest.raises(DataError, match=r"must be valid Unicode, but holds '\\ud83d'"):
        load(lines)


def test_the_plan_hears_how_many_texts_are_cut_or_empty(tmp_path: Path) -> None:
    dataset = load(
        tmp_path / "t.csv", frame(["a b c d e", "a", "", "a b"]), preprocess={"length": 2}
    )
    known, cut, empty, repeated = dataset.notes
    assert known.endswith("a text is 2 of them")
    assert cut == "5 of 20 texts are longer and are cut"
    assert empty == "5 of 20 texts have no words"
    assert "4 of 4 test rows are in the training split too" in repeated


def test_preprocessing_survives_its_files(tmp_path: Path) -> None:
    fitted = load(apps.write_reviews(tmp_path / "t.csv")).preprocess
    fitted.save(tmp_path)
    again = Preprocess.load(tmp_path)
    texts = {"text": ["A fine FILM!", "zebra", ""]}
    assert again.apply(texts).tolist() == fitted.apply(texts).tolist()
    assert (again.input_shape, again.facts) == (fitted.input_shape, fitted.facts)
    assert again.columns == fitted.columns


# --- models --------------------------------------------------------------------------------------


def experiment(source: Path, model: dict[str, Any], **train_settings: Any) -> Experiment:
    return validate(
        {
            "name": "texts",
            "data": {"kind": "text", "source": str(source), "text": "text", "target": "mood"},
            "model": model,
            "train": {"epochs": 3, "batch": 16, "shards": 4, "digest_every": 2, **train_settings},
        }
    )


def test_a_model_learns_what_the_words_say_and_beats_chance(tmp_path: Path) -> None:
    asked = experiment(
        apps.write_reviews(tmp_path / "t.csv"),
        {"name": "text_bag", "width": 8},
        epochs=12,
        optimizer={"name": "adamw", "lr": 0.05},
    )
    dataset = data.load(asked.data)
    replica = Replica(asked, dataset)
    *_, last = replica.epochs()
    assert last["val_accuracy"] == 1.0
    found = baselines.measure(dataset, seed=0)
    assert set(found) == {"baseline", "linear"}
    assert found["linear"]["accuracy"] > 0.9 > found["baseline"]["accuracy"]


@pytest.mark.parametrize(
    "model",
    [
        {"name": "text_bag", "ngrams": 2, "buckets": 64},
        {"name": "text_cnn", "width": 8},
        {"name": "text_transformer", "width": 16, "layers": 1},
    ],
)
def test_any_size_and_a_kill_give_the_bytes_of_one_replica(tmp_path: Path, model: dict) -> None:
    asked = experiment(apps.write_reviews(tmp_path / "t.csv"), model)
    whole = train(asked, [Generation(1)])
    broken = train(asked, [Generation(3, Kill(1, 4, "gather")), Generation(2)])
    assert (whole.sha256, whole.digest) == (broken.sha256, broken.digest)


def test_the_end_of_a_text_is_not_part_of_it() -> None:
    """As many zeros as one likes: a bag sees the words alone."""
    torch.manual_seed(0)
    bag = models.build(Model(name="text_bag", ngrams=2), (6,), 2, {"vocabulary": 9}).eval()
    short, long = torch.tensor([[3, 4, 0]]), torch.tensor([[3, 4, 0, 0, 0, 0]])
    assert torch.equal(bag(short), bag(long))
    assert not torch.equal(bag(torch.tensor([[4, 3, 0]])), bag(short)), "pairs have an order"


def test_a_transformer_sees_the_words_of_a_text_in_their_order() -> None:
    torch.manual_seed(0)
    model = models.build(Model(name="text_transformer"), (6,), 2, {"vocabulary": 9}).eval()
    text = torch.tensor([[3, 4, 5, 0, 0, 0]])
    with torch.no_grad():
        before, turned = model(text), model(torch.tensor([[4, 3, 5, 0, 0, 0]]))
        empty = model(torch.zeros(1, 6, dtype=torch.int64))
        model.positions[3:] += 1.0
        assert torch.equal(model(text), before), "what is behind the end has no weight"
    assert not torch.allclose(before, turned)
    assert empty.isfinite().all()
    with pytest.raises(ExperimentError, match="heads must divide width 64, but got 5"):
        models.build(Model(name="text_transformer", heads=5), (6,), 2, {"vocabulary": 9})


@pytest.mark.parametrize(
    ("name", "vocabulary", "said"),
    [
        ("mlp", 9, "mlp takes no texts .*: set one of text_bag, text_cnn, text_transformer"),
        ("text_cnn", None, "text_cnn takes texts only: set one of cnn, linear, mlp"),
    ],
)
def test_a_model_of_another_kind_of_data_is_named(
    name: str, vocabulary: int | None, said: str
) -> None:
    with pytest.raises(ExperimentError, match=said):
        models.build(
            Model(name=name), (6,), 2, {} if vocabulary is None else {"vocabulary": vocabulary}
        )


# --- versions ------------------------------------------------------------------------------------

ROWS = [{"text": "A fine, warm film"}, {"text": ""}, {"text": 'grim\n"zebra" ﬁne'}]


def test_every_form_of_a_request_is_answered_alike(reviews: Runtime) -> None:
    app = apps.app(reviews)
    sent = pd.DataFrame(ROWS)
    parquet, arrow = io.BytesIO(), io.BytesIO()
    sent.to_parquet(parquet)
    coded = pa.table({"text": pa.array(sent.text).dictionary_encode()})
    with pa.ipc.new_stream(arrow, coded.schema) as stream:
        stream.write_table(coded)
    expected = [a.model_dump() for a in reviews.predict(ROWS)]
    bodies = {
        "application/json": json.dumps({"rows": ROWS}).encode(),
        "text/csv": sent.to_csv(index=False).encode(),
        "application/vnd.apache.parquet": parquet.getvalue(),
        "application/vnd.apache.arrow.stream": arrow.getvalue(),
    }
    for kind, body in bodies.items():
        answer = app.post("/predict", content=body, headers={"content-type": kind})
        assert answer.json()["predictions"] == expected, kind
    packed = b"".join(struct.pack("<I", len(t)) + t for t in (r["text"].encode() for r in ROWS))
    tensor = {"name": "text", "datatype": "BYTES", "shape": [3]}
    for more, behind in (
        ({"data": [r["text"] for r in ROWS]}, b""),
        ({"parameters": {"binary_data_size": len(packed)}}, packed),
    ):
        head = json.dumps({"inputs": [{**tensor, **more}]}).encode()
        headers = {"inference-header-content-length": str(len(head))} if behind else {}
        answer = app.post("/v2/models/reviews/infer", content=head + behind, headers=headers)
        label = answer.json()["outputs"][0]
        assert label["data"] == [e["label"] for e in expected]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (7, "must be a text"),
        (None, "must be a text"),
        ("x" * 1001, r"a text has at most 1,000 characters \(this has 1,001\)"),
        ("\ud83d", "must be a text of valid Unicode"),
    ],
)
def test_a_text_that_is_none_is_named(reviews: Runtime, value: Any, rule: str) -> None:
    with pytest.raises(RowsError, match=f"row 1, field 'text': {rule}"):
        reviews.predict([ROWS[0], {"text": value}])
    answer = apps.app(reviews).post(
        "/predict", content=json.dumps({"rows": [ROWS[0], {"text": value}]}).encode()
    )
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["row"] == 1


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_any_text_has_an_answer_or_a_rule(reviews: Runtime, text: str) -> None:
    (answer,) = reviews.predict([{"text": text}])
    assert answer.label in ("good", "bad")
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_a_version_holds_its_words_and_no_pickle(tmp_path: Path) -> None:
    runtime = apps.reviews(tmp_path)
    folder = tmp_path / "v"
    assert {p.name for p in folder.iterdir()} == {
        *("experiment.yaml", "manifest.json", "schema.json"),
        *("decision.json", "model.onnx", "model.pt2"),
        *("preprocess.json", "preprocess.safetensors", "tokenizer.json"),
    }
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"
    before = [a.model_dump() for a in runtime.predict(ROWS)]
    (tmp_path / "reviews.csv").unlink()
    again = Runtime.load(folder)
    assert [a.model_dump() for a in again.predict(ROWS)] == before


def test_a_file_read_twice_gives_the_same_weights(tmp_path: Path) -> None:
    """The tokenizer's threads and hash tables must not reach the numbers of words."""
    source = apps.write_reviews(tmp_path / "t.csv")
    first, second = (load(source) for _ in range(2))
    assert first.preprocess.tokenizer is not None
    assert first.preprocess.tokenizer.to_str() == second.preprocess.tokenizer.to_str()  # type: ignore[union-attr]
    assert first.digest == second.digest
    asked = experiment(source, {"name": "text_bag"})
    weights = []
    for dataset in (first, second):
        replica = Replica(asked, dataset)
        for _ in replica.epochs():
            pass
        weights.append(state_sha256(replica.state.final_weights()))
    assert weights[0] == weights[1]
