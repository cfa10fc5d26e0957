"""Pretrained models of images, ``hf:NAME``: prepared as they were trained, fine-tuned, refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lepton_ray.config import validate
from lepton_ray.config.schema import Experiment
from lepton_ray.errors import DataError, ExperimentError
from lepton_ray.serving import package
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from tests.elastic import Generation, train
from tests.unit.test_pretrained import built, loaded

KINDS = {
    "vit": {
        "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32,
    },
    "resnet": {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    },
}  # fmt: skip
MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def save(folder: Path, kind: str) -> Path:
    """A tiny model with random weights, its body only, as one on the hub lies in a folder."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    told = {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN,
        "image_std": DEVIATION, "size": {"height": 16, "width": 16},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp("hub") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 40 noisy pictures, of more red and of more blue, some of another size."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, shift in (("blue", (0, 0, 60)), ("red", (60, 0, 0))):
        (root / name).mkdir()
        for number in range(40):
            size = (16, 16) if number % 4 else (24, 20)
            pixels = rng.integers(0, 190, (*size, 3)) + np.array(shift)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def experiment(source: Path, folder: Path, **settings: Any) -> Experiment:
    model, preprocess = settings.pop("model", {}), settings.pop("preprocess", {})
    return validate(
        {
            "name": "tuned",
            "data": {"kind": "image", "source": str(source), "preprocess": preprocess},
            "model": {"name": f"hf:{folder}", **model},
            "train": {"epochs": 2, "batch": 16, "shards": 4, "digest_every": 2, **settings},
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_prepared_and_answered_as_the_model_was_trained(
    hub: dict[str, Path], pictures: Path, kind: str
) -> None:
    asked = experiment(pictures, hub[kind])
    dataset = loaded(asked)
    assert dataset.schema.columns[0].shape == (16, 16, 3), "the size that its files say"
    raw = dataset.test_columns["image"][:3]
    expected = ((raw / 255 - np.array(MEAN)) / np.array(DEVIATION)).transpose(0, 3, 1, 2)
    x = dataset.preprocess.apply({"image": raw})
    assert np.allclose(x, expected, atol=1e-5)
    model = built(asked, dataset).eval()
    with torch.no_grad():
        theirs = model.model(pixel_values=torch.from_numpy(x)).logits  # type: ignore[operator]
        assert torch.equal(model(torch.from_numpy(x)), theirs)
    body = transformers.AutoModel.from_pretrained(hub[kind]).state_dict()
    here = getattr(model.model, kind).state_dict()
    assert here
    assert all(torch.equal(here[n], body[n]) for n in here)
    assert any(dataset.pretrained.sha256 in note for note in dataset.notes)  # type: ignore


@pytest.mark.parametrize(("kind", "model"), [("resnet", {"freeze": ["embedder"]}),
                                             ("vit", {"rank": 2, "alpha": 4})])  # fmt: skip
def test_two_replicas_give_the_bytes_of_one(
    hub: dict[str, Path], pictures: Path, kind: str, model: dict[str, Any]
) -> None:
    asked = experiment(pictures, hub[kind], model=model)
    alone = Replica(asked, loaded(asked))
    before = {n: t.clone() for n, t in alone.state.model.state_dict().items()}
    for _ in alone.epochs():
        pass
    two = train(asked, [Generation(2)])
    assert two.sha256 == state_sha256(alone.state.final_weights())
    assert two.digest == alone.state.digest
    after = alone.state.model.state_dict()
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    parameters = dict(alone.state.model.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    places = {n.rpartition(".")[0] for n in trained}
    statistics = {n for n in after if n not in parameters and n.rpartition(".")[0] in places}
    assert changed == trained | statistics
    assert statistics or kind != "resnet"


def test_fine_tuning_learns_and_a_version_is_complete_in_itself(
    hub: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(hub["resnet"], tmp_path / "resnet")
    asked = experiment(
        pictures, folder, epochs=12, optimizer={"name": "adamw", "lr": 0.01}, augment={"flip": True}
    )
    dataset = loaded(asked)
    replica = Replica(asked, dataset)
    *_, last = replica.epochs()
    assert last["val_accuracy"] > 0.9
    model = built(asked, dataset)
    model.load_state_dict(replica.state.final_weights())
    package.build(
        tmp_path / "v", model=model, dataset_schema=dataset.schema, preprocess=dataset.preprocess,
        experiment_yaml="name: test\n", sample_x=dataset.test.x, max_batch=8, provenance={},
    )  # fmt: skip
    shutil.rmtree(folder)  # nor transformers
    monkeypatch.setitem(sys.modules, "transformers", None)
    answers = Runtime.load(tmp_path / "v").predict(
        package.rows(dataset.schema, dataset.test_columns, len(dataset.test))
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(dataset.test.x))
    found = [list(a.probabilities.values()) for a in answers]
    assert np.allclose(found, torch.softmax(logits, 1).numpy(), atol=1e-5)


def test_what_does_not_fit_is_named(hub: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    other = experiment(pictures, hub["vit"], preprocess={"size": [20, 20]})
    with pytest.raises(ExperimentError, match=r"images of 16 x 16 .*set data.preprocess.size to"):
        built(other, loaded(other))
    built(anywhere := experiment(pictures, hub["resnet"], preprocess={"size": [20, 20]}),
          loaded(anywhere))  # fmt: skip
    np.savez(tmp_path / "grey.npz", x=np.zeros((20, 16, 16), np.uint8), y=np.arange(20) % 2)
    grey = experiment(tmp_path / "grey.npz", hub["vit"])
    with pytest.raises(DataError, match="images of 3 channels of 0 to 255, but these have 1"):
        loaded(grey)
    bare = shutil.copytree(hub["vit"], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ExperimentError, match="has no preprocessor_config.json, so that it is no"):
        loaded(experiment(pictures, bare))
    (bare / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ExperimentError, match="but has 3 in config.json, 1 and 0 in preproc"):
        loaded(experiment(pictures, bare))
    text = transformers.AutoConfig.for_model("bert", hidden_size=16, num_attention_heads=2)
    config = {**text.to_dict(), "num_channels": 3}
    (bare / "config.json").write_text(json.dumps(config))
    shutil.copy(hub["vit"] / "preprocessor_config.json", bare)
    asked = experiment(pictures, bare)
    with pytest.raises(ExperimentError, match="'bert' has no head for the classes of an image"):
        built(asked, loaded(asked))
