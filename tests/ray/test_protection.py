"""An endpoint with keys and limits, on two replicas, over real HTTP."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray

from lepton_ray import models
from lepton_ray.config.schema import Serve
from lepton_ray.data import Dataset
from lepton_ray.errors import RefusedRequestError, ServingError
from lepton_ray.serving import endpoint, followers, keys, package
from lepton_ray.serving.client import Client
from lepton_ray.tracking import registry
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register

NAME = "guarded"
WITHIN_S = 10.0  # a key that is made or revoked


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def key(key_file: Path) -> str:
    return keys.create(key_file, "admin", ("admin",), None)


@pytest.fixture(scope="module")
def config(port: int, key_file: Path, key: str) -> Serve:
    return Serve(
        port=port,
        replicas={"min": 2, "max": 2},
        keys=str(key_file),
        limits={"queue": 4},
        batch={"wait_ms": 200},
    )


@pytest.fixture(scope="module")
def live(
    cluster: None, config: Serve, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[endpoint.Live]:
    root = tmp_path_factory.mktemp("registry")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", stores.new(root))
    settings = experiment(name=NAME)
    model = models.build(settings.model, dataset.preprocess.input_shape, 10)
    registry.promote(register(settings, dataset, model, root), instead_of=None)
    with endpoint.serving(f"{NAME}@champion", config) as live:
        yield live
    patch.undo()


@pytest.fixture(scope="module")
def rows(dataset: Dataset) -> list[dict]:
    return package.rows(dataset.schema, dataset.test_columns, 4)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def status(url: str, key: str) -> int:
    return httpx.get(f"{url}/health", headers={"authorization": f"Bearer {key}"}).status_code


def test_keys_are_needed_and_follow_the_file(
    live: endpoint.Live, key: str, key_file: Path, rows: list[dict]
) -> None:
    assert httpx.get(f"{live.url}/health").status_code == 401
    assert httpx.get(f"{live.url}/v2/health/ready").status_code == 200
    with Client(live.url, key) as client, live.client() as own:
        assert client.predict(rows)["predictions"] == own.predict(rows)["predictions"]
    with pytest.raises(RefusedRequestError, match="401"), Client(live.url) as client:
        client.predict(rows)
    made = keys.create(key_file, "site", ("predict",), None)
    wait_for(lambda: all(status(live.url, made) == 200 for _ in range(20)), WITHIN_S)
    keys.revoke(key_file, "site")
    wait_for(lambda: all(status(live.url, made) == 401 for _ in range(20)), WITHIN_S)
    assert status(live.url, key) == 200


def test_a_scrape_of_either_replica_has_the_counts_of_both(
    live: endpoint.Live, key: str, rows: list[dict]
) -> None:
    admin = {"authorization": f"Bearer {key}"}

    def page() -> dict[str, float]:
        answer = httpx.get(f"{live.url}/metrics", headers=admin)
        assert answer.status_code == 200
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    rows_of = 'lepton_ray_rows_total{version="1"}'
    info = f'lepton_ray_model_info{{model="{NAME}",version="1"}}'
    before = page().get(rows_of, 0.0)
    with Client(live.url, key) as client:
        for _ in range(20):
            client.predict(rows)
    wait_for(lambda: page()[rows_of] == before + 80, 5)
    pages = [page() for _ in range(10)]
    assert {p[rows_of] for p in pages} == {before + 80}
    assert {p[info] for p in pages} == {2.0}
    of_predict = 'lepton_ray_requests_total{route="/predict",status="200",version="1"}'
    assert len({p[of_predict] for p in pages}) == 1
    counts = [p['lepton_ray_request_seconds_count{route="/metrics"}'] for p in pages]
    assert counts == sorted(counts), "a counter never falls"
    assert httpx.get(f"{live.url}/metrics").status_code == 401


def test_too_many_requests_at_a_time_are_429_and_a_client_gets_through(
    live: endpoint.Live, key: str, rows: list[dict]
) -> None:
    admin = {"authorization": f"Bearer {key}"}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{live.url}/predict", json={"rows": rows}, headers=admin, timeout=30)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(80)))
    found = {status: [a for a in answers if a.status_code == status] for status in (200, 429)}
    assert sum(map(len, found.values())) == 80
    assert found[200]
    assert found[429]
    for answer in found[429]:
        assert answer.headers["retry-after"] == "1"
        assert "at a time" in answer.json()["detail"]
    with ThreadPoolExecutor(10) as pool, Client(live.url, key, tries=20) as client:
        told = list(pool.map(lambda _: client.predict(rows), range(20)))
    assert len({json.dumps(t) for t in told}) == 1


def test_the_access_log_is_json_with_a_line_a_request(
    live: endpoint.Live, key: str, rows: list[dict]
) -> None:
    sent = {"json": {"rows": rows}, "headers": {"x-request-id": "find-me"}}
    httpx.post(f"{live.url}/predict", **sent)
    sent["headers"] = {"x-request-id": "find-me-too", "authorization": f"Bearer {key}"}
    httpx.post(f"{live.url}/predict", **sent)
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"

    def lines() -> dict[str, dict]:
        found = {}
        for path in folder.glob(f"access_replica_*{NAME}*"):
            for line in path.read_text().splitlines():
                request = json.loads(line)
                found[request["id"]] = request
        return found

    wait_for(lambda: {"find-me", "find-me-too"} <= lines().keys(), 10)
    refused, answered = lines()["find-me"], lines()["find-me-too"]
    assert (refused["status"], refused["key"], refused["rows"]) == (401, "", 0)
    assert (answered["status"], answered["key"]) == (200, key.split("-")[1])
    assert (answered["rows"], answered["version"], answered["route"]) == (4, 1, "/predict")
    assert os.environ["MLFLOW_TRACKING_URI"] not in json.dumps(lines())


def test_an_endpoint_without_its_key_file_does_not_start(config: Serve, tmp_path: Path) -> None:
    other = config.model_copy(update={"keys": str(tmp_path / "none.json")})
    with (
        pytest.raises(ServingError, match="none.json does not exist: lepton-ray keys create"),
        endpoint.serving(f"{NAME}@champion", other),
    ):
        pass


def test_a_second_command_is_refused_and_a_run_takes_the_endpoint_that_is_there(
    live: endpoint.Live, config: Serve, rows: list[dict]
) -> None:
    actor = ray.get_actor(NAME, namespace=followers.NAMESPACE)
    said = f"{NAME} is served on this cluster already: {NAME}@champion at {live.url}"
    for reference in (f"{NAME}@champion", f"{NAME}/1"):
        with pytest.raises(ServingError, match=said), endpoint.serving(reference, config):
            pass
    with pytest.raises(ServingError, match=said):
        endpoint.check_free(f"{NAME}/1", share=True)
    endpoint.check_free(f"{NAME}@champion", share=True)
    endpoint.check_free("another@champion")
    with endpoint.serving(f"{NAME}@champion", config, share=True) as shared:
        assert (shared.url, shared.key != live.key) == (live.url, True)
        with shared.client() as client:
            for _ in range(10):
                client.predict(rows)
    assert shared.key is not None
    wait_for(lambda: all(status(live.url, shared.key) == 401 for _ in range(20)), WITHIN_S)
    assert ray.get_actor(NAME, namespace=followers.NAMESPACE) == actor, "the follower lives"
    with live.client() as client:
        client.predict(rows)
