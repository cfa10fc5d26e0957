"""Smaller forms of a version: what is measured of them, and which is registered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.artifacts import download_artifacts

from lepton_ray.config import validate
from lepton_ray.data import Dataset, load
from lepton_ray.errors import GateError, InputError
from lepton_ray.pipeline import optimize
from lepton_ray.pipeline.checks import score
from lepton_ray.pipeline.optimize import Candidate
from lepton_ray.serving import package
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.smaller import LEVELS, Latency
from lepton_ray.tracking import registry
from tests import apps, stores
from tests.terminal import Lines
from tests.versions import register


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """Of ``small/1``, a trained version in a registry of its own."""
    root = tmp_path_factory.mktemp("root")
    experiment = validate(
        {
            "name": "small",
            "data": {"kind": "image", "source": "sklearn:digits"},
            "model": {"name": "cnn", "width": 8},
            "storage": str(root / "results"),
        }
    )
    dataset = load(experiment.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = apps.fitted(dataset, experiment.model)
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(root))
        register(experiment, dataset, model, root)
        yield dataset


def test_the_smallest_form_that_is_good_enough_becomes_a_version(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "CALLS", 5)
    terminal = Lines()
    done = optimize.optimize("small/1", smallest=True, lose=0.01, terminal=terminal)
    forms = {c["name"]: c for c in done["candidates"]}
    assert set(forms) == {optimize.PRESENT, "int8 dynamic", "int8 static", *LEVELS}
    # It takes its ranges from the rows that come together, so an answer depends on the neighbours.
    assert "with the rows beside" in done["not_taken"]["int8 dynamic"]
    assert (done["taken"], done["version"]) == ("int8 static", 2)
    assert forms["int8 static"]["neighbours"] <= package.TOLERANCE

    before, after = load_model("small/1"), load_model("small/2")
    assert after.manifest["optimized"]["of"] == "small/1"
    first, second = score(before, dataset), score(after, dataset)
    assert second["accuracy"] >= first["accuracy"] - 0.02
    assert second["accuracy"] == pytest.approx(forms["int8 static"]["test"]["accuracy"])
    sizes = [
        (registry.resolve(f"small/{v}").folder() / "model.onnx").stat().st_size for v in (1, 2)
    ]
    assert sizes[1] < 0.9 * sizes[0]

    version = registry.resolve("small/2")
    assert version.tags["lepton_ray.optimized"] == "int8 static"
    assert version.aliases == (), "it is promoted, or tried, as any other"
    kept = Path(download_artifacts(f"runs:/{version.run_id}/optimize/candidates.json"))
    assert json.loads(kept.read_text())["candidates"] == done["candidates"]
    picture = Path(download_artifacts(f"runs:/{version.run_id}/optimize/pareto.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="is int8 static already"):
        optimize.optimize("small/2", smallest=True, lose=0.01, terminal=terminal)


def test_another_way_to_run_it_on_a_device_becomes_a_version(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "CALLS", 3)
    real = optimize._measure

    def timed(*given: Any) -> list[Candidate]:
        """As a GPU might, where bfloat16 is faster."""
        found = real(*given)
        times = {n: Latency(p50_ms=t, p99_ms=t, batch_ms=t) for n, t in p50_ms.items()}
        return [dataclasses.replace(c, latency=times[c.name]) for c in found]

    p50_ms = {optimize.PRESENT: 1.0, "bf16": 0.8, "compiled": 0.95, "bf16, compiled": 0.5}
    p50_ms[optimize.ON_CPU] = 0.1  # only beside: it is not what the endpoint would run
    monkeypatch.setattr(optimize, "_measure", timed)
    terminal = Lines()
    done = optimize.optimize("small/1", smallest=False, lose=0.01, terminal=terminal, device="cpu")
    assert [c["name"] for c in done["candidates"]] == list(p50_ms)
    assert (done["taken"], done["failed"]) == ("bf16, compiled", {})
    assert done["not_taken"]["compiled"] == "not faster by a tenth"

    name, number = done["name"], done["version"]
    folder = registry.resolve(f"{name}/{number}").folder()
    columns = {"image": dataset.test_columns["image"][:40]}
    single = Runtime.load(registry.resolve("small/1").folder(), device="cpu")
    expected = single.predict_columns(columns)
    found = Runtime.load(folder, device="cpu").predict_columns(columns)
    assert 1e-6 < np.abs(found - expected).max() < 0.1, "it is bfloat16"
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9
    on_cpu = load_model(f"{name}/{number}").predict_columns(columns)
    np.testing.assert_array_equal(on_cpu, load_model("small/1").predict_columns(columns))


@pytest.mark.parametrize("given", [{"smallest": True}, {"methods": ["pruned"]}])
def test_what_makes_no_sense_on_a_gpu_is_named(dataset: Dataset, given: dict[str, Any]) -> None:
    asked = {"smallest": False, "lose": 0.01, "terminal": Lines(), **given}
    with pytest.raises(InputError, match="--gpu looks for the fastest way .* leave out --smallest"):
        optimize.optimize("small/1", device="cuda", **asked)


def test_what_loses_too_much_is_not_registered(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "CALLS", 3)
    versions = len(registry.versions("small"))
    real = optimize._measure

    def worse(*given: Any) -> list[Candidate]:
        found = real(*given)
        for candidate in found:
            if candidate.name != optimize.PRESENT:
                candidate.validation["accuracy"] -= 0.02
        return found

    monkeypatch.setattr(optimize, "_measure", worse)
    terminal = Lines()
    with pytest.raises(GateError, match="no form of it is smaller by a tenth and loses at most"):
        optimize.optimize("small/1", smallest=True, lose=0.005, terminal=terminal)
    assert "loses 0.0" in terminal.said[0], "what was measured is told all the same"
    assert len(registry.versions("small")) == versions


def test_the_reason_against_a_form() -> None:
    def form(p50_ms: float, accuracy: float, size: int, neighbours: float = 0.0) -> Candidate:
        return Candidate(
            name="a",
            bytes=size,
            latency=Latency(p50_ms=p50_ms, p99_ms=2 * p50_ms, batch_ms=9.0),
            validation={"accuracy": accuracy},
            test={"accuracy": 0.5},
            neighbours=neighbours,
        )

    present = form(1.0, 0.95, 1000)
    for candidate, smallest, said in [
        (form(0.5, 0.946, 2000), False, ""),
        (form(0.5, 0.944, 2000), False, "loses 0.0060 of accuracy"),
        (form(0.95, 0.95, 100), False, "not faster by a tenth"),
        (form(5.0, 0.95, 100), True, ""),
        (form(0.5, 0.95, 950), True, "not smaller by a tenth"),
        (form(0.5, 0.95, 100, 0.1), False, "answers change by 0.1 with the rows beside"),
    ]:
        assert optimize._why_not(candidate, present, "accuracy", 0.005, smallest) == said
