"""A canary and a shadow on a real endpoint: routed, counted, decided, and kept over crashes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
import ray
import torch
from onnx import TensorProto, helper

from lepton_ray import models
from lepton_ray.cli import main
from lepton_ray.config.schema import Canary, Serve
from lepton_ray.data import Dataset
from lepton_ray.serving import endpoint, followers, manifest, package
from lepton_ray.serving.endpoint import Live
from lepton_ray.serving.load import load_model
from lepton_ray.tracking import endpoints, registry
from lepton_ray.tracking.canary import Decision
from lepton_ray.tracking.registry import ModelVersion
from tests import stores
from tests.ray.conftest import experiment
from tests.versions import register

DEADLINE_S = 120
EXPERIMENT = experiment(name="tried")
LENIENT = {"disagreement": 1.0, "p99_ratio": 1e6}
LONG = Canary(minutes=1000, rule=LENIENT)


def add(dataset: Dataset, root: Path, seed: int) -> ModelVersion:
    torch.manual_seed(seed)
    shape, outputs = dataset.preprocess.input_shape, dataset.schema.outputs
    return register(EXPERIMENT, dataset, models.build(EXPERIMENT.model, shape, outputs), root)


def break_version(version: ModelVersion) -> None:
    """Now it can be loaded and warmed up, and raises for whatever picture is not black."""
    integers = {"start": 0, "end": 10, "axis": 1}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("ReduceMax", ["flat"], ["brightest"], keepdims=1),
            helper.make_node("Cast", ["brightest"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["found"], axis=0),
            helper.make_node("Squeeze", ["found"], ["one"]),
            helper.make_node("Slice", ["flat", "start", "end", "axis"], ["ten"]),
            helper.make_node("Add", ["ten", "one"], ["y"]),
        ],
        "broken",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("table", TensorProto.FLOAT, [1], [0.0]),
            *(helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in integers.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = version.folder()
    onnx.save(model, folder / "model.onnx")
    manifest.write(folder, json.loads((folder / manifest.NAME).read_text()))


def spoil(version: ModelVersion) -> None:
    """Now ONNX Runtime cannot load it."""
    folder = version.folder()
    (folder / "model.onnx").write_bytes(b"no model")
    manifest.write(folder, json.loads((folder / manifest.NAME).read_text()))


@pytest.fixture(scope="module")
def live(
    cluster: None, port: int, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """Two replicas of version 1; version 2 raises, 3 and 4 are good, 5 is no model, 6 is lost."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("registry")
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(root))
        versions = [add(dataset, root, seed) for seed in range(1, 7)]
        registry.promote(versions[0], instead_of=None)
        break_version(versions[1])
        spoil(versions[4])
        shutil.rmtree(versions[5].folder())
        replicas = {"min": 2, "max": 2}
        with endpoint.serving("tried@champion", Serve(port=port, replicas=replicas)) as live:
            yield live


@pytest.fixture(scope="module")
def url(live: Live) -> str:
    return live.url


@pytest.fixture(autouse=True)
def nothing_tried(url: str) -> Iterator[None]:
    yield
    endpoints.set_shadow("tried", None)
    if (now := endpoints.tried("tried").canary) is not None:
        endpoints.end_canary("tried", now, Decision("end", "the test is over"))
    wait_for(lambda: not any("versions" in httpx.get(f"{url}/health").json() for _ in range(20)))


@pytest.fixture(scope="module")
def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return package.rows(dataset.schema, dataset.test_columns, 2)


def start(version: int, share: float, settings: Canary = LONG) -> None:
    endpoints.start_canary(registry.resolve(f"tried/{version}"), share, settings)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def wait_until_tried(url: str, version: int, what: str = "canary") -> None:
    """Both replicas know: many times in a row."""
    wait_for(
        lambda: all(
            httpx.get(f"{url}/health").json().get(what, {}).get("version") == version
            for _ in range(20)
        )
    )


class Callers:
    """Each with a session of its own; checks every answer against the version that it names."""

    def __init__(self, url: str, rows: list[dict[str, Any]]) -> None:
        self._url, self._rows = url, rows
        self._client = httpx.Client()
        self._expected: dict[int, Any] = {}

    def ask(self, n: int) -> dict[int, int]:
        """Caller -> version that answered."""
        return {caller: self._ask(f"caller {caller}") for caller in range(n)}

    def _ask(self, caller: str) -> int:
        answer = self._client.post(
            f"{self._url}/predict", json={"rows": self._rows}, headers={"X-Session-ID": caller}
        )
        assert answer.status_code == 200, answer.text
        said = answer.json()
        version = said["version"]
        if version not in self._expected:
            found = load_model(f"tried/{version}").predict(self._rows)
            self._expected[version] = [a.model_dump() for a in found]
        assert said["predictions"] == self._expected[version]
        return version


@pytest.fixture
def callers(url: str, rows: list[dict[str, Any]]) -> Callers:
    return Callers(url, rows)


def tally() -> dict[int, Any]:
    (report,) = endpoints.reports("tried")
    return report.tally


def test_a_canary_that_raises_is_rolled_back_and_nobody_sees_it(
    url: str, callers: Callers, capsys: pytest.CaptureFixture[str]
) -> None:
    start(2, 0.5)
    wait_until_tried(url, 2)
    assert set(callers.ask(100).values()) == {1}, "the champion answers in its place"
    wait_for(lambda: endpoints.tried("tried").canary is None)
    last = endpoints.tried("tried").last
    assert last is not None
    assert (last["version"], last["outcome"]) == (2, "rolled back")
    assert last["reason"].startswith("errors 100.0%")
    tag = registry.resolve("tried/2").tags[endpoints.CANARY]
    assert tag.startswith("rolled back: errors 100.0%")
    assert registry.resolve("tried@champion").version == 1
    wait_for(lambda: "canary" not in httpx.get(f"{url}/health").json())
    wait_for(lambda: httpx.get(f"{url}/health").json().get("last") == last)
    assert main(["status", "tried"]) == 0
    said = capsys.readouterr().out
    assert f"{url}: tried@champion is version 1, 2 replicas" in said
    assert "last      version 2 rolled back: errors 100.0%" in said


def test_what_cannot_be_loaded_is_rolled_back_and_the_rest_followed(
    url: str, callers: Callers
) -> None:
    endpoints.set_shadow("tried", 6)
    wait_for(lambda: "version 6 cannot be read" in httpx.get(f"{url}/health").text)
    start(5, 0.5)
    wait_for(lambda: endpoints.tried("tried").canary is None)
    last = endpoints.tried("tried").last
    assert last is not None
    assert (last["version"], last["outcome"]) == (5, "rolled back")
    assert last["reason"].startswith("it cannot be served: version 5 cannot be loaded")
    start(3, 1.0)
    wait_until_tried(url, 3)
    assert set(callers.ask(10).values()) == {3}
    assert "version 6 cannot be read" in endpoints.reports("tried")[0].problem
    endpoints.set_shadow("tried", None)
    wait_for(lambda: "problem" not in httpx.get(f"{url}/health").json())


def test_callers_stay_with_their_version_and_a_killed_controller_goes_on(
    url: str, callers: Callers
) -> None:
    start(3, 0.3)
    endpoints.set_shadow("tried", 4)
    wait_until_tried(url, 3)
    wait_until_tried(url, 4, "shadow")
    before = callers.ask(100)
    assert set(before.values()) == {1, 3}, "a shadow answers nobody"
    assert 15 <= list(before.values()).count(3) <= 45
    assert callers.ask(100) == before, "on either replica"
    to_canary = 2 * list(before.values()).count(3)
    wait_for(lambda: 3 in tally() and tally()[3].requests == to_canary)
    assert tally()[1].requests == 200 - to_canary
    wait_for(lambda: tally()[4].requests + tally()[4].dropped >= 200 - to_canary)
    wait_for(lambda: tally()[3].compared + tally()[3].dropped >= 2 * to_canary)

    (now,) = endpoints.reports("tried")
    actor = ray.get_actor("tried", namespace=followers.NAMESPACE)
    os.kill(pid_of(actor), signal.SIGKILL)
    wait_for(lambda: endpoints.reports("tried")[0].seen_s > now.seen_s + 1 and alive(actor))
    (then,) = endpoints.reports("tried")
    assert (then.id, then.canary, then.tally) == (now.id, now.canary, now.tally)
    assert callers.ask(100) == before
    wait_for(lambda: tally()[3].requests == to_canary * 3 // 2)


def test_whoever_serves_is_told_what_answers(live: Live) -> None:
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if text == "serve  tried@champion is version 1":
            raise KeyboardInterrupt

    telling = threading.Thread(target=live.keep, args=(say,))
    telling.start()
    start(3, 0.3)
    endpoints.set_shadow("tried", 4)
    last = "version 1, version 3 for 30% of callers, copies to version 4"
    wait_for(lambda: told[-1:] == [f"serve  tried@champion is {last}"])
    canary = endpoints.tried("tried").canary
    assert canary is not None
    endpoints.end_canary("tried", canary, Decision("rollback", "by hand"))
    endpoints.set_shadow("tried", None)
    telling.join(DEADLINE_S)
    assert told[-1] == "serve  tried@champion is version 1"


def test_a_good_canary_is_promoted_when_its_time_is_over(url: str, callers: Callers) -> None:
    start(3, 1.0, Canary(minutes=0.05, rule={**LENIENT, "requests": 50}))
    wait_until_tried(url, 3)
    assert set(callers.ask(20).values()) == {3}
    wait_for(lambda: "20 of 50 requests" in endpoints.reports("tried")[0].decision)
    assert registry.resolve("tried@champion").version == 1
    callers.ask(40)
    wait_for(lambda: endpoints.tried("tried").canary is None)
    assert registry.resolve("tried@champion").version == 3
    last = endpoints.tried("tried").last
    assert last is not None
    assert (last["version"], last["outcome"]) == (3, "promoted")
    wait_for(lambda: all(httpx.get(f"{url}/health").json()["version"] == 3 for _ in range(20)))
    registry.rollback("tried")
    wait_for(lambda: all(httpx.get(f"{url}/health").json()["version"] == 1 for _ in range(20)))


def test_requests_unlike_the_training_data_are_told(
    url: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = package.rows(dataset.schema, dataset.test_columns, 16)
    dark = [{"image": [[0.3 * pixel for pixel in line] for line in r["image"]]} for r in rows]

    def told() -> Any:
        httpx.post(f"{url}/predict", json={"rows": dark}).raise_for_status()
        return endpoints.reports("tried")[0].drifts

    wait_for(told)
    (version, columns), *_ = endpoints.reports("tried")[0].drifts.items()
    assert version == registry.resolve("tried@champion").version
    assert columns["brightness of image"].psi > 0.25
    assert main(["status", "tried"]) == 0
    assert "of brightness of image from the training data of version" in capsys.readouterr().out
    page = httpx.get(f"{url}/metrics").text
    assert 'lepton_ray_drift{column="brightness of image",version="1"}' in page


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def alive(actor: Any) -> bool:
    with contextlib.suppress(ray.exceptions.RayError):
        return pid_of(actor) > 0
    return False
