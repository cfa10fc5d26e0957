"""An endpoint that has no replica while nobody asks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray import serve

from lepton_ray import models
from lepton_ray.config.schema import Serve
from lepton_ray.data import Dataset
from lepton_ray.serving import app, endpoint, package
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import registry
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register

DEADLINE_S = 180


def replicas() -> int:
    deployment = serve.status().applications["quiet"].deployments["quiet"]
    return sum(deployment.replica_states.values())


@pytest.mark.slow
def test_the_last_replica_goes_and_comes_back_when_it_is_asked(
    cluster: None, port: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    monkeypatch.setattr(app, "QUIET_S", 1.0)
    quiet = experiment(name="quiet")
    model = models.build(quiet.model, dataset.preprocess.input_shape, 10)
    registry.promote(register(quiet, dataset, model, tmp_path), instead_of=None)
    rows = package.rows(dataset.schema, dataset.test_columns, 3)
    expected = [a.model_dump() for a in load_model("quiet/1").predict(rows)]
    config = Serve(port=port, replicas={"min": 0, "max": 1})
    with endpoint.serving("quiet@champion", config) as live, live.client() as client:
        assert client.predict(rows)["predictions"] == expected
        end = time.monotonic() + DEADLINE_S
        while replicas():
            assert time.monotonic() < end, "a replica is there still"
            time.sleep(0.5)
        assert client.predict(rows)["predictions"] == expected
