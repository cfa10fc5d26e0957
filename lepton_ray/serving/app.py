"""The deployment of an endpoint on Ray Serve: replicas that batch, follow and answer.

No ``from __future__ import annotations`` here: Serve inspects the class.
"""

import asyncio
import logging
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError

from lepton_ray.config.schema import Serve
from lepton_ray.data.schema import Schema
from lepton_ray.errors import InputError, LeptonRayError
from lepton_ray.serving import api
from lepton_ray.serving.explain import deployment as explaining
from lepton_ray.serving.explain.answers import Explanation
from lepton_ray.serving.follower import Files, Present, write_files
from lepton_ray.serving.guard import OVERLOADED_S, log_access, needs_keys
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.metrics import Metrics, Snapshot
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import Columns
from lepton_ray.serving.runtime import Floats, Runtime

logger = logging.getLogger("ray.serve")

ASK_S = 1.0  # between two looks for a new version
EXPLAINED_S = 5.0  # after which a client whose question found no room may come again
TOTALS_S = 5.0  # that a scrape waits for the follower
REFUSED = 64  # requests in a replica beyond its queue, so that it is the one to refuse them
MAX_QUEUED = 1000  # requests waiting at a proxy, when every replica has that many


def application(follower: Any, name: str, config: Serve) -> serve.Application:
    """A Serve application that answers with the version `follower.Follower` names.

    Args:
        follower: handle of the actor.
        name: of the model.
    """
    replicas = config.replicas
    scale: dict[str, Any] = (
        {"num_replicas": replicas.min}
        if replicas.min == replicas.max
        else {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "upscale_delay_s": 3,
                "downscale_delay_s": 30,
            }
        }
    )
    deployment: Any = serve.deployment(serve.ingress()(Endpoint))
    bound: serve.Application = deployment.options(
        name=name,
        # The replica's own queue (`guard.Guard`) is the shorter one: it knows the caller's key, and
        # its 429 is counted, logged and in the form of the route.
        max_ongoing_requests=config.limits.queue + REFUSED,
        max_queued_requests=MAX_QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=OVERLOADED_S),
        ray_actor_options={"num_cpus": 1},
        **scale,
    ).bind(follower, name, config, explaining.application(name) if config.explain else None)
    return bound


class Endpoint:
    """One replica; what `api.build` calls a predictor."""

    async def __init__(  # type: ignore[misc]
        self, follower: Any, name: str, config: Serve, explaining: Any
    ) -> None:
        self._follower = follower
        self._explaining = explaining  # a handle of the deployment, or None
        self._name = name
        self._config = config
        self._id = uuid.uuid4().hex
        self._counts = Metrics()
        self._keyring = Keyring(()) if needs_keys(config.host, config.keys) else None
        self._problem = ""
        present = await self._ask()
        self._runtime, self._files = await self._load(present), present.files
        self._counts.serves(name, self._runtime.version)
        self._batched = serve.batch(
            max_batch_size=config.batch.max,
            batch_wait_timeout_s=config.batch.wait_ms / 1000,
            batch_size_fn=_rows_of,
        )(self._answer_batch)
        # One thread: the forward pass stays off the event loop, which answers health checks.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for it here, in the replica, when ``__init__`` is done."""
        return api.build(
            self,
            limits=self._config.limits,
            keyring=self._keyring,
            counts=self._counts,
            log=log_access,
            echo=False,
            explain=self._config.explain,
        )

    @property
    def runtime(self) -> Runtime:
        """The version that answers now."""
        return self._runtime

    @property
    def problem(self) -> str:
        """What keeps it from following its alias, or ""."""
        return self._problem

    async def infer(self, columns: Columns) -> tuple[Runtime, Floats]:
        """The version that answered, and [n, classes] probabilities or [n, 1] values.

        More rows than a batch holds go through the model in parts, between which others have their
        turn; all by the version that was there at the first.
        """
        rows, most = _length(columns), self._config.batch.max
        if rows <= most:
            answered: tuple[Runtime, Floats] = await self._batched(columns)
            return answered
        runtime = self._runtime
        loop = asyncio.get_running_loop()
        parts = []
        for at in range(0, rows, most):
            part = {name: values[at : at + most] for name, values in columns.items()}
            parts.append(await loop.run_in_executor(self._thread, runtime.forward, part))
        return runtime, np.concatenate(parts)

    async def explain(
        self, columns: Columns, method: str | None, target: str | None
    ) -> tuple[Runtime, list[Explanation]]:
        """The version that answers, and why it answers each row so.

        Raises:
            InputError: see `explainer.Explainer.explain`.
            RefusedError: 429 when too many are waiting.
        """
        runtime, files = self._runtime, self._files
        try:
            found: list[Explanation] = await self._explaining.explain.remote(
                runtime.version, [files], columns, method, target
            )
        except BackPressureError:
            text = "too many explanations are waiting: come again later"
            raise RefusedError(429, text, retry_after_s=EXPLAINED_S) from None
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        return runtime, found

    async def totals(self) -> Snapshot:
        """What all replicas have counted.

        Raises:
            RefusedError: 503 when the follower does not answer; a part of the sum would look as if
                every counter had started over.
        """
        asked = self._follower.totals.remote(self._id, self._counts.snapshot())
        try:
            async with asyncio.timeout(TOTALS_S):
                found: Snapshot = await asked
        except (RayError, TimeoutError) as error:
            logger.warning("no totals: %s", error)
            text = "the counts of all replicas cannot be added up now"
            raise RefusedError(503, text, retry_after_s=TOTALS_S) from None
        return found

    async def _ask(self) -> Present:
        present: Present = await self._follower.present.remote(self._id, self._counts.snapshot())
        if self._keyring is not None:
            self._keyring.replace(present.keys, replicas=present.replicas)
        return present

    async def _load(self, present: Present) -> Runtime:
        return await asyncio.to_thread(_load, await present.files, self._name, present.version)

    async def _follow(self) -> None:
        """Change to each version that is named anew; requests go on meanwhile."""
        refused: dict[int, str] = {}
        while True:
            await asyncio.sleep(ASK_S)
            schema = self._runtime.schema
            try:
                present = await self._ask()
                self._problem = present.problem or refused.get(present.version, "")
                if present.version == self._runtime.version or present.version in refused:
                    continue
                new = await self._load(present)
            except (RayError, LeptonRayError) as error:
                # What went wrong names files and holds traces: it is for the log.
                logger.warning("cannot follow: %s", error)
                self._problem = f"cannot follow, see the log: {type(error).__name__}"
                continue
            if (new.schema.classes, _types(new.schema)) != (schema.classes, _types(schema)):
                refused[present.version] = (
                    f"version {present.version} takes other columns or answers other classes: "
                    "start its endpoint anew"
                )
                self._problem = refused[present.version]
                continue
            self._runtime, self._files = new, present.files
            self._counts.serves(self._name, new.version)

    async def _answer_batch(self, requests: list[Columns]) -> list[Any]:
        """For each request the runtime that answers, and its part of the answers."""
        runtime = self._runtime
        merged = {
            name: np.concatenate([columns[name] for columns in requests]) for name in requests[0]
        }
        loop = asyncio.get_running_loop()
        whole = await loop.run_in_executor(self._thread, runtime.predict_columns, merged)
        ends = np.cumsum([_length(columns) for columns in requests])[:-1]
        return [(runtime, part) for part in np.split(whole, ends)]


def _load(files: Files, name: str, version: int) -> Runtime:
    """A version from its files, warm.

    Raises:
        ModelError: when they were changed or are of a newer format.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        runtime = Runtime.load(Path(folder), name=name, version=version)
    runtime.warm_up()
    return runtime


def _types(schema: Schema) -> list[tuple[Any, ...]]:
    """What a request's columns must be; ranges and categories may differ between versions."""
    return [(c.name, c.kind, c.shape, c.longest) for c in schema.columns]


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _rows_of(requests: list[Any]) -> int:
    """A request counts as many as its rows, so that a batch is bounded in rows."""
    return sum(_length(columns) for columns in requests)
