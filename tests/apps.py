"""An endpoint's application without Ray: the routes over a runtime in this process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import torch
from torch import nn

from lepton_ray import data, models
from lepton_ray.config.schema import ImageData, Limits, Model, TableData, TextData, TextPreprocess
from lepton_ray.data import Dataset
from lepton_ray.data.decision import AnyDecision
from lepton_ray.pipeline import carried
from lepton_ray.serving import api, package
from lepton_ray.serving.explain.answers import to_json
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.metrics import Metrics, Snapshot
from lepton_ray.serving.runtime import Runtime
from lepton_ray.training.tasks import task_of


@dataclass
class Local:
    """A predictor (see `api.Predictor`)."""

    runtime: Runtime
    problem: str = ""
    sticky: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    counts: Metrics = field(default_factory=Metrics)
    explainer: Explainer | None = None
    before: Callable[[], Any] | None = None
    """Awaited before each answer."""

    @property
    def answering(self) -> tuple[Runtime, ...]:
        return (self.runtime,)

    async def infer(
        self, columns: dict[str, Any], caller: str, version: str | None = None
    ) -> tuple[Runtime, Any]:
        if self.before is not None:
            await self.before()
        return self.runtime, self.runtime.predict_columns(columns)

    async def explain(
        self, runtime: Runtime, columns: dict[str, Any], method: str | None, target: str | None
    ) -> str:
        assert self.explainer is not None
        found = self.explainer.explain(columns, method, target)
        return to_json(runtime.name, runtime.version, found)

    async def totals(self) -> Snapshot:
        return self.counts.snapshot()


@dataclass
class App:
    """The application, reached in this process, and its access log."""

    local: Local
    asgi: Any
    lines: list[dict[str, Any]]

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("POST", path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.later(method, path, **options))

    async def later(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)


def app(
    runtime: Runtime,
    keyring: Keyring | None = None,
    explainer: Explainer | None = None,
    **limits: Any,
) -> App:
    local, lines = Local(runtime, explainer=explainer), []
    made = api.build(
        local,
        limits=Limits(**limits),
        keyring=keyring,
        counts=local.counts,
        log=lines.append,
        echo=True,
        explain=explainer is not None,
    )
    return App(local, made, lines)


def version(
    folder: Path, dataset: Dataset, model: Model, name: str, decided: AnyDecision | None = None
) -> Runtime:
    """Version 3 of an untrained model."""
    torch.manual_seed(0)
    package.build(
        folder,
        model=models.build(
            model,
            dataset.preprocess.input_shape,
            dataset.schema.outputs,
            dataset.preprocess.facts,
        ),
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        decision=decided,
        experiment_yaml="name: test\n",
        sample_x=dataset.test.x[:64],
        max_batch=64,
        provenance={},
    )
    return Runtime.load(folder, name=name, version=3)


def write_people(folder: Path) -> Path:
    """The folder of a version that was trained with a city of an unusual name."""
    cities = ["Bonn", "Rom", "</script><b>"] * 20
    frame = pd.DataFrame({"age": np.arange(60.0), "city": cities, "y": ["yes", "no"] * 30})
    frame.to_csv(folder / "people.csv", index=False)
    settings = TableData(kind="table", source=str(folder / "people.csv"), target="y")
    version(folder / "v", data.load(settings), Model(name="mlp", width=8), "people")
    return folder / "v"


def people(folder: Path, model: Model | None = None) -> Runtime:
    """Age and city, and one of two classes."""
    cities = ["Bonn", "Rom", "Çorum"] * 100
    frame = pd.DataFrame({"age": np.arange(300.0), "city": cities, "y": ["yes", "no"] * 150})
    frame.to_csv(folder / "people.csv", index=False)
    settings = TableData(kind="table", source=str(folder / "people.csv"), target="y")
    small = Model(name="mlp", width=8)
    return version(folder / "v", data.load(settings), model or small, "people")


def diabetes(folder: Path) -> Runtime:
    """Ten numbers, and a number to predict."""
    settings = TableData(
        kind="table", source="sklearn:diabetes", target="target", task="regression"
    )
    return version(folder / "v", data.load(settings), Model(name="linear"), "diabetes")


WORDS = {"good": ["fine", "lovely", "bright", "warm"], "bad": ["dull", "cold", "grim", "slow"]}


def write_reviews(path: Path, n: int = 120) -> Path:
    """Texts of some words each, two classes of other words; every third is one for testing."""
    rng = random.Random(0)
    rows = []
    for number in range(n):
        mood = ("good", "bad")[number % 2]
        words = [rng.choice([*WORDS[mood], "the", "film", "is"]) for _ in range(rng.randint(3, 9))]
        part = "test" if number % 3 == 0 else "train"
        rows.append({"text": " ".join(words), "mood": mood, "part": part})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def reviews(folder: Path) -> Runtime:
    """Texts, and one of two classes."""
    source = write_reviews(folder / "reviews.csv")
    settings = TextData(
        kind="text",
        source=str(source),
        text="text",
        target="mood",
        preprocess=TextPreprocess(length=12, characters=1000),
    )
    return version(folder / "v", data.load(settings), Model(name="text_cnn", width=8), "reviews")


def digits(folder: Path) -> Runtime:
    """Images of 8 x 8 with numbers from 0 to 16."""
    dataset = data.load(ImageData(kind="image", source="sklearn:digits"))
    return version(folder / "v", dataset, Model(name="cnn", width=4), "digits")


def fitted(dataset: Dataset, model: Model, steps: int = 300, seed: int = 0) -> nn.Module:
    """A small model that has learned something, in a second."""
    torch.manual_seed(seed)
    given = dataset.preprocess
    module = models.build(model, given.input_shape, dataset.schema.outputs, given.facts)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    cost = task_of(dataset).loss
    x, y = torch.from_numpy(dataset.train.x), torch.from_numpy(dataset.train.y)
    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        loss = cost(module(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def made(folder: Path, dataset: Dataset, module: nn.Module) -> tuple[Explainer, Runtime]:
    package.build(
        folder,
        model=module,
        dataset_schema=dataset.schema,
        preprocess=dataset.preprocess,
        experiment_yaml="name: test\n",
        sample_x=dataset.test.x[:32],
        max_batch=8,
        provenance={},
        beside=carried.files(module, dataset, examples=5),
    )
    return Explainer.load(folder), Runtime.load(folder, name="test", version=3)
