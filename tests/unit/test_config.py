"""The experiment file: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import textwrap

import pytest

from lepton_ray.config import load, loads, render, settings_of, with_settings
from lepton_ray.config.schema import Experiment, Train
from lepton_ray.errors import ExperimentError

SMALL = """\
name: small
data: {kind: image, source: "sklearn:digits"}
model: {name: cnn, width: 8}
"""


def problems(text: str, *settings: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        loads(textwrap.dedent(text), settings=settings)
    return caught.value.problems


def test_render_writes_every_default_and_reads_back_equal() -> None:
    experiment = loads(SMALL)
    text = render(experiment)
    assert loads(text) == experiment
    assert {"epochs: 10", "seed: 0", "clip: null"} <= {line.strip() for line in text.splitlines()}


def test_unknown_key_is_refused_with_line_and_nearest_name() -> None:
    (problem,) = problems(SMALL + "train:\n  epocs: 3\n")
    assert problem == "line 5: train.epocs: unknown key 'epocs', did you mean 'epochs'?"


def test_unknown_key_of_a_distribution_names_the_distributions() -> None:
    (problem,) = problems(SMALL + "tune: {space: {train.optimizer.lr: {loguniforn: [1, 2]}}}\n")
    assert "did you mean 'loguniform'?" in problem


def test_spot_is_for_live_replicas() -> None:
    (problem,) = problems(SMALL + "workers: {max: 4, spot: true, mode: restart}\n")
    assert "spot: true is for live replicas, but mode is restart" in problem


def test_all_problems_are_told_at_once() -> None:
    found = problems(SMALL + "train: {epochs: 0, batch: many}\nworkers: {min: 3, max: 2}\n")
    assert len(found) == 3
    assert any("train.epochs" in p and "but got 0" in p for p in found)
    assert any("train.batch" in p and "'many'" in p for p in found)
    assert any("min <= max must hold, but got 3 and 2" in p for p in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping"),
        ("name: a\nname: b", "'name' is given twice"),
        ("name: [", "line 1: not valid YAML"),
        (
            "name: a\ndata: {kind: sound, source: a}\nmodel: {name: cnn}",
            "supported: 'image', 'table', 'text'",
        ),
        ("name: a\ndata: {source: a}\nmodel: {name: cnn}", "the key 'kind' is required"),
        ("data: {kind: image, source: a}\nmodel: {name: cnn}", "name: this key is required"),
        (SMALL + "version: 9", "version is 9, this lepton_ray reads up to 1"),
        (SMALL + "train: {batch: 30}", "set batch to 28 or 32"),
        (SMALL + "workers: {max: 9}", "set train.shards to 16 or workers.max to 4"),
        (SMALL + "tune: {space: {}}", "tune.space"),
        (SMALL + "tune: {space: {serve.port: {choice: [1]}}}", "cannot be searched"),
        (SMALL + "tune: {space: {data.split.seed: {randint: [1, 9]}}}", "read once, for all"),
        (SMALL + "tune: {space: {train.batch: {randint: [9, 3]}}}", "low < high"),
        (SMALL + "tune: {space: {train.batch: {choice: [9], randint: [3, 4]}}}", "exactly one"),
        (SMALL + "train: {optimizer: {lr: .nan}}", "finite"),
    ],
)
def test_bad_input_says_the_rule(text: str, said: str) -> None:
    assert any(said in problem for problem in problems(text)), problems(text)


def test_missing_file_is_an_input_error(tmp_path) -> None:
    with pytest.raises(ExperimentError, match="cannot be read"):
        load(tmp_path / "none.yaml")


def test_set_changes_any_dotted_path_and_reads_yaml_1_2_floats() -> None:
    experiment = loads(SMALL, settings=["train.optimizer.lr=1e-4", "model.width=64"])
    assert experiment.train.optimizer.lr == 1e-4
    assert experiment.model.params == {"width": 64}


def test_yes_is_a_text_and_true_a_truth_value() -> None:
    settings = ["train.class_weights={yes: 5, no: 1}", "data.preprocess.normalize=false"]
    experiment = loads(SMALL, settings=settings)
    assert experiment.train.class_weights == {"yes": 5, "no": 1}
    assert experiment.data.preprocess.normalize is False
    assert loads(render(experiment)) == experiment


def test_set_refuses_what_the_file_may_not_say() -> None:
    assert "train.epocs" in problems(SMALL, "train.epocs=3")[0]
    assert "PATH=VALUE" in problems(SMALL, "train.epochs")[0]
    assert "is a value, not a section" in problems(SMALL, "name.first=3")[0]


def test_with_settings_keeps_the_rest() -> None:
    experiment = loads(SMALL + "tune: {space: {train.batch: {choice: [32, 64]}}}\n")
    changed = with_settings(experiment, {"train.batch": 32})
    assert changed.train.batch == 32
    assert changed.tune == experiment.tune


@pytest.mark.parametrize(
    ("batch", "shards"), [(8, 4), (32, 4), (64, 4), (128, 4), (256, 8), (320, 8), (1024, 32)]
)
def test_default_shards_follow_the_batch_and_not_the_workers(batch: int, shards: int) -> None:
    assert Train(batch=batch).n_shards == shards


def test_experiments_are_frozen() -> None:
    experiment = loads(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        experiment.name = "other"  # type: ignore[misc]


def test_settings_of_lists_nested_paths() -> None:
    paths = settings_of(Experiment)
    assert {"train.optimizer.lr", "data.split.test", "train.early_stop.patience"} <= set(paths)
