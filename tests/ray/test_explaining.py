"""Explanations on a real Serve: a deployment of their own, from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray import serve

from lepton_ray import models
from lepton_ray.config.schema import Serve
from lepton_ray.data import Dataset
from lepton_ray.serving import endpoint, package
from lepton_ray.serving.explain import deployment
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.requests import columns_of
from lepton_ray.tracking import registry
from lepton_ray.tracking.registry import ModelVersion
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register

DEADLINE_S = 180


@pytest.fixture(scope="module")
def version(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelVersion]:
    root = tmp_path_factory.mktemp("registry")
    small = experiment()
    model = models.build(small.model, dataset.preprocess.input_shape, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(root))
        made = register(small, dataset, model, root)
        registry.promote(made, instead_of=None)
        yield made


def replicas(name: str) -> int:
    deployed = serve.status().applications["small"].deployments[name]
    return sum(deployed.replica_states.values())


@pytest.mark.slow
def test_the_first_question_starts_the_replica_that_explains(
    cluster: None, version: ModelVersion, dataset: Dataset, port: int
) -> None:
    rows = package.rows(dataset.schema, dataset.test_columns, 2)
    explainer = Explainer.load(version.folder())
    expected = explainer.explain(columns_of(dataset.schema, rows))
    limits = {"timeout_s": DEADLINE_S}
    with endpoint.serving("small@champion", Serve(port=port, limits=limits)) as live:
        assert (replicas("small"), replicas("small-explain")) == (1, 0)
        url, json = f"{live.url}/explain", {"rows": rows}
        answer = httpx.post(url, json=json, timeout=DEADLINE_S)
        assert answer.status_code == 200, answer.text
        assert replicas("small-explain") == 1
        given = answer.json()
        assert (given["model"], given["version"]) == ("small", 1)
        for theirs, ours in zip(given["explanations"], expected, strict=True):
            assert theirs["target"] == ours.target
            assert theirs["completeness"]["holds"]
            assert theirs["answer"] == pytest.approx(ours.answer, abs=1e-5)

        # Many at a time: each is answered or sent away, and a prediction is answered meanwhile.
        many = deployment.WAITING + 30
        slow = {"rows": rows}
        with ThreadPoolExecutor(many + 1) as pool:
            asked = [
                pool.submit(
                    httpx.post, url, json=slow, params={"method": "lime"}, timeout=DEADLINE_S
                )
                for _ in range(many)
            ]
            predicted = httpx.post(f"{live.url}/predict", json=json, timeout=DEADLINE_S)
            statuses = [future.result().status_code for future in asked]
        assert predicted.status_code == 200
        assert set(statuses) == {200, 429}, statuses

    with endpoint.serving("small@champion", Serve(port=port, explain=False)) as live:
        assert list(serve.status().applications["small"].deployments) == ["small"]
        assert httpx.post(f"{live.url}/explain", json=json).status_code == 404
