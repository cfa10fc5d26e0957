"""Pretrained models of texts, ``hf:NAME``: read, fine-tuned, made a version, refused."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as parts

from lepton_ray import data, models
from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment, Model
from lepton_ray.data import pretrained as stored
from lepton_ray.data import words
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import ExperimentError
from lepton_ray.jobs import packing
from lepton_ray.models.low_rank import LowRank
from lepton_ray.serving import package
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.manifest import sha256
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training import importance
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.tuning import space
from tests import apps
from tests.elastic import Generation, train

WORDS = [word for mood in apps.WORDS.values() for word in mood] + ["the", "film", "is"]
MARKS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    # RoBERTa's padding is not token 0, and its positions begin behind it.
    "roberta": ("<s>", "<pad>", "</s>", "<unk>"),
}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save(folder: Path, kind: str = "bert", **settings: Any) -> Path:
    """A tiny model with random weights, its body only, as one on the hub lies in a folder."""
    marks = MARKS[kind]
    numbers = {word: n for n, word in enumerate([*marks, *WORDS])}
    unknown, first, last = (
        ("[UNK]", "[CLS]", "[SEP]") if kind == "bert" else ("<unk>", "<s>", "</s>")
    )
    tokenizer = Tokenizer(parts.WordPiece(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(mark, numbers[mark]) for mark in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ends
    )
    padding = "[PAD]" if kind == "bert" else "<pad>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, unk_token=unknown
    ).save_pretrained(folder)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=len(numbers),
        pad_token_id=numbers[padding],
        **{"max_position_embeddings": 24, **SIZES, **settings},
    )
    torch.manual_seed(1)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hub") / "bert")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apps.write_reviews(tmp_path_factory.mktemp("data") / "t.csv")


def experiment(source: Path, folder: Path, **settings: Any) -> Experiment:
    model = settings.pop("model", {})
    return validate(
        {
            "name": "tuned",
            "data": {"kind": "text", "source": str(source), "text": "text", "target": "mood"},
            "model": {"name": f"hf:{folder}", **model},
            "train": {"epochs": 2, "batch": 16, "shards": 4, "digest_every": 2, **settings},
        }
    )


def loaded(asked: Experiment) -> Dataset:
    return data.load(asked.data, model=asked.model.name)


def built(asked: Experiment, dataset: Dataset) -> torch.nn.Module:
    given = dataset.preprocess
    return models.build(asked.model, given.input_shape, dataset.schema.outputs, dataset.facts)


def refused(asked: Experiment) -> str:
    with pytest.raises(ExperimentError) as found:
        built(asked, loaded(asked))
    return str(found.value)


# --- the tokenizer and the model are those of the folder ------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_gets_the_answer_that_transformers_gives(
    tmp_path: Path, source: Path, kind: str
) -> None:
    folder = save(tmp_path / kind, kind)
    asked = experiment(source, folder)
    dataset = loaded(asked)
    model = built(asked, dataset).eval()
    texts = ["The film is FINE", "grim zebra", ""]
    x = dataset.preprocess.apply({"text": texts})
    assert (x[2] != 0).sum() == 2, "an empty text has its two marks"
    own = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = own(texts, padding="max_length", max_length=x.shape[1], return_tensors="pt")
    theirs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model.model(**theirs).logits  # type: ignore[operator]
        found = model(torch.from_numpy(x))
    assert torch.allclose(found, expected, atol=1e-6)
    body = transformers.AutoModel.from_pretrained(folder).state_dict()
    here = getattr(model.model, kind).state_dict()
    assert all(torch.equal(here[n], body[n]) for n in here if ".pooler" not in f".{n}")


def test_a_run_says_what_it_started_from(source: Path, bert: Path, tmp_path: Path) -> None:
    dataset = loaded(experiment(source, bert))
    assert dataset.pretrained is not None
    assert dataset.pretrained.sha256 == sha256(bert / "model.safetensors")
    assert any(dataset.pretrained.sha256 in note for note in dataset.notes)
    other = shutil.copytree(bert, tmp_path / "other")
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5, 0] += 1
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert loaded(experiment(source, other)).digest != dataset.digest
    assert loaded(experiment(source, bert)).digest == dataset.digest


def test_weights_in_several_files_are_one_model(source: Path, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    transformers.AutoModel.from_pretrained(bert).save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    one, several = (built(a, loaded(a)) for a in map(experiment, [source] * 2, [bert, folder]))
    assert torch.equal(
        one.model.bert.embeddings.word_embeddings.weight,  # type: ignore
        several.model.bert.embeddings.word_embeddings.weight,  # type: ignore
    )


def test_a_name_is_looked_up_on_the_hub(
    source: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in p or ".py" in p for p in allow_patterns)
        return str(bert)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    stored.read("hf:someone/tiny@abc", "text")
    stored.read("hf:tiny", "text")
    assert asked == [("someone/tiny", "abc"), ("tiny", None)]

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(ExperimentError, match="nor to be had from the Hugging Face hub .no route"):
        stored.read("hf:someone/tiny", "text")


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{"freeze": ["embeddings"]}, {"rank": 2, "alpha": 4}])
def test_two_replicas_give_the_bytes_of_one(
    source: Path, bert: Path, model: dict[str, Any]
) -> None:
    asked = experiment(source, bert, model=model)
    alone = Replica(asked, loaded(asked))
    for _ in alone.epochs():
        pass
    two = train(asked, [Generation(2)])
    assert two.sha256 == state_sha256(alone.state.final_weights())
    assert two.digest == alone.state.digest


def test_what_is_frozen_stays_and_does_not_travel(source: Path, bert: Path) -> None:
    asked = experiment(source, bert, model={"freeze": ["embeddings", "layer.0"]})
    replica = Replica(asked, loaded(asked))
    before = {n: t.clone() for n, t in replica.state.model.state_dict().items()}
    for _ in replica.epochs():
        pass
    changed = {n for n, t in replica.state.final_weights().items() if not torch.equal(t, before[n])}
    assert any(".layer.1." in n for n in changed)
    assert any(".classifier." in n for n in changed)
    assert not any(".embeddings." in n or ".layer.0." in n for n in changed)
    travels = sum(replica._step._numels) - 2 - sum(b.numel() for b in replica._step._buffers) * 8
    free = sum(p.numel() for p in replica.state.model.parameters() if p.requires_grad)
    assert travels == free < sum(p.numel() for p in replica.state.model.parameters())


def test_an_adapter_starts_as_nothing_and_is_merged(source: Path, bert: Path) -> None:
    plain, adapted = (experiment(source, bert, model=m) for m in ({}, {"rank": 2}))
    dataset = loaded(plain)
    x = torch.from_numpy(dataset.test.x)
    torch.manual_seed(0)
    without = built(plain, dataset).eval()
    torch.manual_seed(0)
    model = built(adapted, dataset).eval()
    assert torch.equal(model(x), without(x))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained if "classifier" not in n} == {"up", "down"}
    few = built(experiment(source, bert, model={"rank": 2, "adapt": ["query"]}), dataset)
    assert sum(isinstance(m, LowRank) for m in few.modules()) == SIZES["num_hidden_layers"]
    for module in model.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.up)
    expected = model(x)
    models.low_rank.merge(model)
    assert not any(isinstance(m, LowRank) for m in model.modules())
    assert not torch.allclose(expected, without(x), atol=1e-3)
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_fine_tuning_learns(source: Path, bert: Path) -> None:
    asked = experiment(
        source,
        bert,
        model={"rank": 4, "alpha": 8},
        epochs=10,
        optimizer={"name": "adamw", "lr": 0.02},
    )
    replica = Replica(asked, loaded(asked))
    *_, last = replica.epochs()
    assert last["val_accuracy"] > 0.9


# --- versions -------------------------------------------------------------------------------------


def test_a_version_is_complete_in_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "roberta", "roberta")
    asked = experiment(source, folder, model={"rank": 2})
    dataset = loaded(asked)
    model = built(asked, dataset)
    for module in model.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.up)
    version = tmp_path / "v"
    manifest = package.build(
        version,
        model=model,
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        experiment_yaml="name: test\n",
        sample_x=dataset.test.x,
        max_batch=40,
        provenance={},
    )
    assert manifest["weights_sha256"] == state_sha256(model.state_dict()), "as training gave them"
    assert manifest["parity"]["batch_sizes"] == [1, 2, 3, 7, len(dataset.test)]
    assert {p.suffix for p in version.iterdir()} == {
        ".json",
        ".onnx",
        ".pt2",
        ".safetensors",
        ".yaml",
    }
    graph = (version / "model.onnx").read_bytes()
    assert b"down" not in graph, "adapters are merged"
    # Neither the model's folder, nor a network, nor transformers.
    shutil.rmtree(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(socket, "socket", None)
    texts = ["The film is fine", "", "grim zebra " * 40]
    answers = Runtime.load(version).predict([{"text": text} for text in texts])
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(dataset.preprocess.apply({"text": texts})))
    expected = torch.softmax(logits, 1).numpy()
    found = [list(a.probabilities.values()) for a in answers]
    assert np.allclose(found, expected, atol=1e-5)
    (explained,) = Explainer.load(version).explain({"text": texts[:1]}, method="occlusion")
    assert [part.name for part in explained.parts] == ["The", "film", "is", "fine"]


def test_what_a_model_goes_by_is_words_and_no_marks(source: Path, bert: Path) -> None:
    asked = experiment(source, bert)
    dataset = loaded(asked)
    found = importance.measure(built(asked, dataset), dataset, dataset.preprocess)  # type: ignore
    assert {part["name"] for part in found["parts"]} <= set(WORDS)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, but got 0"),
        ({"rank": 17}, "rank must be at most 16, the width of bert.encoder.layer.0"),
        ({"adapt": ["query"]}, "adapt says where adapters go, but there are none: set rank"),
        ({"rank": 2, "adapt": ["qery"]}, "adapt names 'qery', .*, did you mean 'query'"),
        ({"freeze": ["embedings"]}, "freeze names 'embedings', .*, did you mean 'embeddings'"),
        ({"freeze": "body"}, r"freeze must be a list of names, but got 'body': write \[body\]"),
        ({"freeze": ["body", "classifier"]}, "leaves nothing to train: take a name out"),
        ({"frozen": []}, "takes no 'frozen', did you mean 'freeze'"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    source: Path, bert: Path, model: dict[str, Any], said: str
) -> None:
    assert re.search(said, refused(experiment(source, bert, model=model)))


def test_a_text_longer_than_the_positions_is_refused(source: Path, tmp_path: Path) -> None:
    for kind, most in (("bert", 8), ("roberta", 6)):
        folder = save(tmp_path / kind, kind, max_position_embeddings=8)
        said = refused(experiment(source, folder))
        assert "texts have up to 11 tokens" in said
        assert f"set data.preprocess.length to {most} or less" in said


def test_only_safetensors_and_no_code_are_read(source: Path, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "m")
    asked = experiment(source, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle, which can run code and is not read: conv" in refused(asked)
    (folder / "pytorch_model.bin").unlink()
    assert "has no model.safetensors: save the model with" in refused(asked)
    (folder / "model.safetensors").write_bytes(b"\0" * 99)
    assert "its weights cannot be loaded" in refused(asked)
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text("raise SystemExit('ran')")
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(own))
    assert "does not know; code that comes with a model is never run" in refused(asked)


def test_folders_that_are_no_model_are_named(source: Path, bert: Path, tmp_path: Path) -> None:
    assert "no folder './none' (looked in" in refused(
        experiment(source, Path("./none"), model={"name": "hf:./none"})
    )
    folder = shutil.copytree(bert, tmp_path / "m")
    asked = experiment(source, folder)
    config = json.loads((folder / "config.json").read_text())

    def said(**settings: Any) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return refused(asked)

    assert "the architecture 'vit' has no head for the classes of a text" in said(model_type="vit")
    assert "more in the form config.json says" in said(hidden_size=32)
    assert "more in the form config.json says" in said(num_hidden_layers=3)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(asked)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json: write it with" in refused(asked)


def test_a_tokenizer_of_another_model_is_refused(source: Path, bert: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.add_tokens(["more"])
    own.save(str(folder / "tokenizer.json"))
    assert "its tokenizer has 16 tokens, but the model has vectors for 15" in refused(
        experiment(source, folder)
    )


def test_it_says_what_to_install(source: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'lepton-ray[hf]'" in refused(experiment(source, bert))


def test_it_is_for_texts_prepared_for_it(source: Path, bert: Path) -> None:
    asked = experiment(source, bert)
    table = validate(
        {
            "name": "x",
            "data": {"kind": "table", "source": str(source), "target": "mood"},
            "model": {"name": f"hf:{bert}"},
        }
    )
    with pytest.raises(ExperimentError, match="of texts or images, but data.kind is table"):
        data.load(table.data, model=table.model.name)
    with pytest.raises(ExperimentError, match="takes texts or images prepared for it only"):
        models.build(asked.model, (6,), 2, {"vocabulary": 9})
    dataset = loaded(asked)
    with pytest.raises(ExperimentError, match="the data are prepared for hf:.*text_cnn cannot"):
        models.build(Model(name="text_cnn"), (6,), 2, dataset.facts)
    searched = asked.model_dump(mode="json") | {
        "tune": {"metric": "val_loss", "space": {"model.name": {"choice": ["text_cnn", "hf:tiny"]}}}
    }
    with pytest.raises(ExperimentError, match="has a tokenizer of its own, and the trials of"):
        space.check(validate(searched))


def test_a_local_model_goes_to_the_cluster(source: Path, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    packing.pack(experiment(source, bert), tmp_path, tmp_path / "job")
    sent = tmp_path / "job" / "data" / "bert"
    assert (sent / "model.safetensors").read_bytes() == (bert / "model.safetensors").read_bytes()
    assert "hf:./data/bert" in (tmp_path / "job" / "experiment.yaml").read_text()


def test_a_tokenizer_without_an_unknown_word_has_none() -> None:
    own = Tokenizer(parts.BPE({"<pad>": 0, "a": 1}, []))
    assert words.unknown(own) is None
