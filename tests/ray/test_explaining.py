"""Explanations on a real Serve: a process of their own, from nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray

from lepton_ray import models
from lepton_ray.config.schema import Serve
from lepton_ray.data import Dataset
from lepton_ray.errors import InputError
from lepton_ray.serving import endpoint, followers, package
from lepton_ray.serving.explain.actor import REST_S, WAITING, Question, Questions
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.files import read_files
from lepton_ray.serving.requests import columns_of
from lepton_ray.tracking import registry
from lepton_ray.tracking.registry import ModelVersion
from tests import stores
from tests.lab import wait_for
from tests.ray.conftest import experiment
from tests.versions import register

DEADLINE_S = 400


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


def explaining() -> list[int]:
    """Process ids of what explains."""
    actors = ray._private.state.actors().values()
    ours = [actor for actor in actors if actor["ActorClassName"] == "Explaining"]
    return [actor["Pid"] for actor in ours if actor["State"] == "ALIVE"]


@pytest.mark.slow
def test_the_first_question_starts_what_explains(
    cluster: None, version: ModelVersion, dataset: Dataset, port: int
) -> None:
    rows = package.rows(dataset.schema, dataset.test_columns, 2)
    explainer = Explainer.load(version.folder())
    expected = explainer.explain(columns_of(dataset.schema, rows))
    limits = {"timeout_s": DEADLINE_S}
    with endpoint.serving("small@champion", Serve(port=port, limits=limits)) as live:
        assert explaining() == []
        url, json = f"{live.url}/explain", {"rows": rows}
        # With the follower go the files that it has handed out.
        actor = ray.get_actor("small", namespace=followers.NAMESPACE)
        ray.kill(actor, no_restart=False)
        wait_for(lambda: followers.find("small") is not None, DEADLINE_S)
        predicted = httpx.post(f"{live.url}/predict", json=json, timeout=DEADLINE_S)
        assert predicted.status_code == 200
        wait_for(
            lambda: httpx.post(url, json=json, timeout=DEADLINE_S).status_code == 200, DEADLINE_S
        )
        answer = httpx.post(url, json=json, timeout=DEADLINE_S)
        assert answer.status_code == 200, answer.text
        assert len(explaining()) == 1
        given = answer.json()
        assert (given["model"], given["version"]) == ("small", 1)
        for theirs, ours in zip(given["explanations"], expected, strict=True):
            assert theirs["target"] == ours.target
            assert theirs["completeness"]["holds"]
            assert theirs["answer"] == pytest.approx(ours.answer, abs=1e-5)

        httpx.post(f"{live.url}/predict", json=json, timeout=DEADLINE_S)
        start_s = time.monotonic()
        for _ in range(6):
            httpx.post(url, json=json, timeout=DEADLINE_S)
        assert time.monotonic() > start_s + 5 * REST_S, "the replica predicts too"

        # Many at a time: each is answered or sent away, and a prediction is answered meanwhile.
        many = WAITING + 30
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

    wait_for(lambda: not explaining(), DEADLINE_S)
    with endpoint.serving("small@champion", Serve(port=port, explain=False)) as live:
        assert httpx.post(f"{live.url}/explain", json=json).status_code == 404


@ray.remote(num_cpus=0)
class Refusing:
    async def explain(self, *question: Any) -> str:
        raise InputError("no gradients")


@ray.remote(num_cpus=0)
class Hanging:
    def __init__(self) -> None:
        self.state = "idle"

    async def explain(self, *question: Any) -> str:
        self.state = "asked"
        try:
            await asyncio.Event().wait()
        finally:
            self.state = "taken back"

    async def says(self) -> str:
        return self.state


@pytest.mark.slow
def test_what_explains_goes_when_nobody_asks_and_comes_back(
    cluster: None, version: ModelVersion, dataset: Dataset
) -> None:
    rows = package.rows(dataset.schema, dataset.test_columns, 1)
    columns = columns_of(dataset.schema, rows)
    files = ray.put(read_files(version.folder()))

    async def ask(questions: Questions, **other: Any) -> str:
        asked = Question("small", 1, files, columns, None, None)
        return await questions.ask(dataclasses.replace(asked, **other))

    async def scenario() -> None:
        questions = Questions("small", idle_s=2.0)
        first, second = await asyncio.gather(ask(questions), ask(questions, version=2))
        assert first == second.replace('"version":2', '"version":1') != second
        (before,) = explaining()
        wait_for(lambda: not explaining(), DEADLINE_S)
        assert await ask(questions) == first
        (after,) = explaining()
        assert after != before

        async def seconds(gives_way: bool) -> float:
            start_s = time.monotonic()
            for _ in range(4):
                await ask(questions, gives_way=gives_way)
            return time.monotonic() - start_s

        took_s = await seconds(gives_way=True)
        assert took_s > 3 * REST_S
        assert await seconds(gives_way=False) < took_s, "nobody waits for nothing"

        os.kill(after, signal.SIGKILL)
        assert await ask(questions) == first

        questions._actor = Refusing.remote()
        with pytest.raises(InputError, match="^no gradients$"):
            await ask(questions)

        questions._actor = hanging = Hanging.remote()
        asked = asyncio.create_task(ask(questions))
        for state in ("asked", "taken back"):
            async with asyncio.timeout(DEADLINE_S):
                while await hanging.says.remote() != state:
                    await asyncio.sleep(0.05)
            asked.cancel()

    asyncio.run(scenario())


@pytest.mark.slow
def test_what_was_started_and_never_asked_goes(cluster: None) -> None:
    started = Questions("small", idle_s=2.0)._start()
    wait_for(explaining, DEADLINE_S)
    wait_for(lambda: not explaining(), DEADLINE_S)
    del started  # which alone would have ended it
