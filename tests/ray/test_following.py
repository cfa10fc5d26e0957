"""An endpoint of an alias answers with whatever version the alias names, and drops nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from lepton_ray import data, models
from lepton_ray.config.schema import Model, Serve, Split
from lepton_ray.data import Dataset
from lepton_ray.serving import endpoint, package
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import registry
from lepton_ray.tracking.registry import ModelVersion
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register

FOLLOWED_S = 10.0  # the promise
EXPERIMENT = experiment(name="followed")


def version(dataset: Dataset, root: Path, seed: int) -> ModelVersion:
    torch.manual_seed(seed)
    shape, outputs = dataset.preprocess.input_shape, dataset.schema.outputs
    return register(EXPERIMENT, dataset, models.build(EXPERIMENT.model, shape, outputs), root)


@pytest.fixture
def url(
    cluster: None, port: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    registry.promote(version(dataset, tmp_path, 1), instead_of=None)
    replicas = {"min": 2, "max": 2}
    with endpoint.serving("followed@champion", Serve(port=port, replicas=replicas)) as live:
        yield live.url


def healths(url: str) -> list[dict]:
    """Enough answers to have some of both replicas."""
    return [httpx.get(f"{url}/health").json() for _ in range(20)]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def test_a_promotion_and_a_rollback_reach_the_endpoint_without_a_dropped_request(
    url: str, dataset: Dataset, tmp_path: Path
) -> None:
    version(dataset, tmp_path, 2)
    rows = package.rows(dataset.schema, dataset.test_columns, 3)
    expected = {
        number: [a.model_dump() for a in load_model(f"followed/{number}").predict(rows)]
        for number in (1, 2)
    }
    assert expected[1] != expected[2]
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                answers.append(client.post(f"{url}/predict", json={"rows": rows}))

    def all_say(number: int) -> bool:  # of the last ones, which both replicas gave
        return len(answers) > 40 and all(a.json()["version"] == number for a in answers[-40:])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(lambda: all_say(1), 60)
        registry.promote(registry.resolve("followed/2"), instead_of=1)
        wait_for(lambda: all_say(2), FOLLOWED_S)
        registry.rollback("followed")
        wait_for(lambda: all_say(1), FOLLOWED_S)
    finally:
        stop.set()
        asking.join()
    assert {a.status_code for a in answers} == {200}
    for answer in answers:
        said = answer.json()
        assert said["predictions"] == expected[said["version"]], "one version a request"


def test_a_version_that_takes_other_rows_is_not_followed_and_named(
    url: str, dataset: Dataset, tmp_path: Path
) -> None:
    settings = EXPERIMENT.data.model_copy(update={"split": Split(seed=7, test=0.6)})
    version(data.load(settings), tmp_path, 3)  # other data of the same form is followed
    registry.promote(registry.resolve("followed/2"), instead_of=1)
    wait_for(lambda: all(h["version"] == 2 for h in healths(url)), FOLLOWED_S)

    table = data.load(
        experiment(data={"kind": "table", "source": "sklearn:iris", "target": "target"}).data
    )
    shape, outputs = table.preprocess.input_shape, table.schema.outputs
    model = models.build(Model(name="linear"), shape, outputs)
    register(EXPERIMENT, table, model, tmp_path)
    registry.promote(registry.resolve("followed/3"), instead_of=2)
    wait_for(lambda: all("problem" in h for h in healths(url)), FOLLOWED_S)
    for health in healths(url):
        assert health["version"] == 2
        assert "version 3 takes other columns" in health["problem"]
