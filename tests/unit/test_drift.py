"""How far requests are from the training data: counted in replicas, added up, told."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lepton_ray import data, models
from lepton_ray.cli import main
from lepton_ray.config import validate
from lepton_ray.config.schema import ImageData, Model, Rule, TableData, TextData
from lepton_ray.data.drift import FEWEST, Bins, Drift, measured
from lepton_ray.serving import drift, metrics
from lepton_ray.serving.runtime import Runtime
from lepton_ray.tracking import endpoints, registry
from lepton_ray.tracking.canary import Canary, Counts, decide
from lepton_ray.tracking.endpoints import Report
from lepton_ray.tracking.store import client
from tests import apps, stores
from tests.versions import register

RNG = np.random.default_rng(0)
N = 4000


def table(path: Path, frame: pd.DataFrame, **settings: Any) -> data.Dataset:
    frame.to_csv(path / "table.csv", index=False)
    given = {"kind": "table", "source": str(path / "table.csv"), "target": "y", **settings}
    return data.load(TableData(**given))


def frame(n: int = N) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": RNG.normal(40, 10, n),
            "children": RNG.choice([0.0, 0.7, 1.0], n, p=[0.9, 0.05, 0.05]),
            "city": RNG.choice(["Bonn", "Rom", "Oslo"], n, p=[0.6, 0.3, 0.1]),
            "y": RNG.choice(["yes", "no"], n),
        }
    )


def columns(given: pd.DataFrame) -> dict[str, Any]:
    return {name: given[name].to_numpy() for name in given.columns}


def far(dataset: data.Dataset, given: dict[str, Any]) -> dict[str, Drift | None]:
    found = measured(dataset.preprocess, given)
    return {name: bins.compare(bins.count(found[name])) for name, bins in dataset.bins.items()}


def test_rows_like_those_of_training_are_near_and_others_are_far(tmp_path: Path) -> None:
    missing = {"preprocess": {"missing": "median"}}
    dataset = table(tmp_path, frame(), **missing)
    near = far(dataset, columns(frame(1000)))
    assert near.keys() == {"age", "children", "city"}
    assert all(d is not None and d.psi < 0.1 and d.rows == 1000 for d in near.values()), near
    assert near["children"].unseen == near["city"].unseen == 0, "0.7 is the file's 0.7"
    other = frame(1000)
    other["age"] += 15
    other.loc[:499, "children"] = np.nan
    other.loc[:199, "city"] = "Wien"
    moved = far(dataset, columns(other))
    assert all(d.psi > 0.25 for d in moved.values()), moved
    assert moved["city"].unseen == 0.2
    assert moved["children"].unseen == 0.5
    assert 0 < moved["age"].unseen < 0.2


def test_shares_are_compared_by_the_population_stability_index() -> None:
    bins = Bins(counts=(500, 500, 0), categories=("a", "b"))
    found = bins.compare([300, 700, 0])
    assert found == Drift(round(0.2 * np.log(0.7 / 0.5) - 0.2 * np.log(0.3 / 0.5), 4), 0.0, 1000)
    assert bins.compare([FEWEST - 1, 0, 0]) is None
    one_new = bins.compare([500, 499, 1])
    assert one_new is not None
    assert one_new.psi < 0.01
    assert Bins.from_json(json.loads(json.dumps(bins.to_json()))) == bins


@pytest.mark.parametrize("value", [1.0, -1.0, 1e300, -1e300, np.nan])
def test_one_value_in_all_of_training(value: float, tmp_path: Path) -> None:
    given = frame(200)
    given["age"] = 1.0
    dataset = table(tmp_path, given)
    (found,) = (
        d
        for name, d in far(dataset, columns(frame(600).assign(age=value))).items()
        if name == "age"
    )
    assert found is not None
    assert found.unseen == (0.0 if value == 1.0 else 1.0)


def test_pictures_are_compared_by_their_brightness() -> None:
    dataset = data.load(ImageData(kind="image", source="sklearn:digits", split={"test": 0.5}))
    images = dataset.test_columns["image"]
    (near,) = far(dataset, {"image": images}).values()
    (dark,) = far(dataset, {"image": images * 0.5}).values()
    assert near is not None
    assert dark is not None
    assert near.psi < 0.1
    assert dark.psi > 0.25
    assert list(dataset.bins) == ["brightness of image"]


def test_texts_are_compared_by_their_words(tmp_path: Path) -> None:
    source = apps.write_reviews(tmp_path / "reviews.csv", 3000)
    dataset = data.load(TextData(kind="text", source=str(source), text="text", target="mood"))
    texts = dataset.test_columns["text"][:600]
    near = far(dataset, {"text": texts})
    assert near.keys() == {"words of text", "unknown words of text"}
    assert all(d.psi < 0.1 for d in near.values()), near
    other = np.array([f"{text} le film est tiède" for text in texts], object)
    moved = far(dataset, {"text": other})
    assert all(d.psi > 0.25 for d in moved.values()), moved


def test_a_replica_looks_at_some_rows_of_every_version_and_never_at_all(tmp_path: Path) -> None:
    dataset = table(tmp_path, frame())
    experiment = validate(
        {
            "name": "people",
            "data": {"kind": "table", "source": str(tmp_path / "table.csv"), "target": "y"},
            "model": {"name": "linear"},
        }
    )
    model = models.build(Model(name="linear"), dataset.preprocess.input_shape, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
        folder = register(experiment, dataset, model, tmp_path).folder()
    new, old = (Runtime.load(folder, name="people", version=v) for v in (1, 2))
    assert drift.read(new.manifest) == dataset.bins
    old.manifest.pop(drift.MANIFEST)
    watch = drift.Watch()
    rows = columns(frame(1000))
    start_s = time.monotonic()
    while time.monotonic() < start_s + 0.5:
        watch.look([new, old], rows)
    seen = watch.take()
    assert seen.keys() == {1}, "of a version without bins there is nothing to tell"
    looked = sum(seen[1]["age"])
    assert drift.ROWS // 2 < looked <= drift.ROWS * 6
    assert {sum(counts) for counts in seen[1].values()} == {looked}
    assert watch.take() == {}
    watch.give_back(seen)
    assert watch.take() == seen


def test_the_latest_rows_count_most() -> None:
    bins = {1: {"x": Bins(counts=(50, 50), categories=("a",))}}
    seen: drift.Seen = {}
    for _ in range(1000):
        drift.add(seen, {1: {"x": [50, 50]}})
    found = drift.compare(bins, seen)[1]["x"]
    assert found.psi < 0.001
    assert found.rows <= drift.LATEST
    for _ in range(300):
        drift.add(seen, {1: {"x": [100, 0]}})
    assert drift.compare(bins, seen)[1]["x"].psi > 0.25
    assert drift.compare({}, seen) == {}


def test_it_is_told_by_metrics_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    drifts = {3: {"age": Drift(0.4, 0.125, 1200), "city": Drift(0.01, 0.0, 1200)}}
    page = metrics.page(metrics.of_drifts(drifts)).decode()
    assert 'lepton_ray_drift{column="age",version="3"} 0.4' in page
    assert 'lepton_ray_drift_unseen{column="age",version="3"} 0.125' in page
    assert 'lepton_ray_drift_rows{column="city",version="3"} 1200.0' in page

    client().create_registered_model("people")
    said: dict[str, Any] = {"url": "http://x", "reference": "people@champion", "version": 3}
    told = Report(id="a", replicas=1, seen_s=time.time(), drifts=drifts, **said)
    endpoints.report("people", told)
    assert endpoints.reports("people") == [told]
    assert main(["status", "people"]) == 0
    shown = capsys.readouterr().out
    assert "drift 0.40 of age from the training data of version 3: 12.5% of 1,200 rows" in shown
    assert "city" not in shown, "what is near is in the metrics only"

    long = {3: {"x" * 6000: Drift(0.4, 0.0, 1200)}}
    endpoints.report("people", Report(id="a", replicas=1, seen_s=1.0, drifts=long, **said))
    assert endpoints.reports("people")[0].drifts == {}, "the rest is told still"


def test_what_endpoints_said_that_are_long_gone_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    client().create_registered_model("people")
    said: dict[str, Any] = {"url": "http://x", "reference": "people@champion", "version": 3}
    now_s = time.time()
    for name, ago_s in [("here", 5.0), ("silent", 600.0), ("gone", endpoints.FORGET_S + 5)]:
        endpoints.report("people", Report(id=name, replicas=1, seen_s=now_s - ago_s, **said))
    endpoints.forget("people", registry.model("people").tags, now_s)
    assert [report.id for report in endpoints.reports("people")] == ["here", "silent"]


def test_what_another_release_told_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    client().create_registered_model("people")
    value = {
        "id": "a", "url": "http://x", "reference": "people@champion", "version": 3, "replicas": 1,
        "seen_s": 1.0, "tally": {}, "drift": {"age": [100, 20]},
    }  # fmt: skip
    client().set_registered_model_tag("people", f"{endpoints.ENDPOINT}a", json.dumps(value))
    (found,) = endpoints.reports("people")
    assert (found.version, found.drifts) == (3, {})
    assert registry.model("people").tags


def test_a_canary_far_from_its_training_data_is_rolled_back_where_a_rule_says_so() -> None:
    def decided(**rule: Any) -> str:
        canary = Canary(
            id="a", version=8, share=0.1, instead_of=7, started_s=0, minutes=1, sticky="",
            rule=Rule(**rule),
        )  # fmt: skip
        tally = {8: Counts(requests=500), 7: Counts()}
        drifts = {"age": Drift(0.4, 0.0, 900), "city": Drift(0.1, 0.0, 900)}
        return " ".join(vars(decide(canary, tally, 7, 61, drifts=drifts)).values())

    assert decided().startswith("promote")
    assert decided(drift=0.5).startswith("promote")
    assert decided(drift=0.25).startswith("rollback drift 0.40 of age")
