"""The deployment of an endpoint on Ray Serve: replicas that batch, follow and answer.

No ``from __future__ import annotations`` here: Serve inspects the class.
"""

import asyncio
import logging
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from starlette.types import ASGIApp

from lepton_ray.config.schema import Serve
from lepton_ray.data.schema import Schema
from lepton_ray.serving import access, api, drift, short, sweep
from lepton_ray.serving.batcher import Batcher
from lepton_ray.serving.explain.actor import Question, Questions
from lepton_ray.serving.files import Files, write_files
from lepton_ray.serving.guard import OVERLOADED_S, needs_keys
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.metrics import Metrics, Snapshot
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import Columns
from lepton_ray.serving.runtime import Floats, Runtime
from lepton_ray.serving.told import Present, Told
from lepton_ray.serving.versions import Versions

logger = logging.getLogger("ray.serve")

ASK_S = 1.0  # between two looks for a new version
PREDICTS_S = 1.0  # after a prediction, there may be more of them
TOTALS_S = 5.0  # that a scrape waits for the follower
REFUSED = 64  # requests in a replica beyond its queue, so that it is the one to refuse them
ONGOING = 16  # requests in a replica beyond which another is started: batches gather under load
QUIET_S = 300.0  # after which no replica is left, where there may be none
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
                "initial_replicas": max(1, replicas.min),  # the first request is at the start
                "target_ongoing_requests": ONGOING,
                "upscale_delay_s": 3,
                "downscale_delay_s": 30,
                "downscale_to_zero_delay_s": QUIET_S,
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
        ray_actor_options={"num_cpus": 1, **({"num_gpus": config.gpus} if config.gpus else {})},
        **scale,
    ).bind(follower, name, config)
    return bound


class Endpoint:
    """One replica; what `api.build` calls a predictor."""

    async def __init__(  # type: ignore[misc]
        self, follower: Any, name: str, config: Serve
    ) -> None:
        self._log = access.beside(logger)
        self._follower = follower
        self._questions = Questions(name)
        self._name = name
        self._config = config
        self._id = uuid.uuid4().hex
        self._counts = Metrics()
        self._keyring = Keyring(()) if needs_keys(config.host, config.keys) else None
        self._predicted_s = -PREDICTS_S  # when last, by the monotonic clock
        self._problem = ""
        self._refused: dict[int, str] = {}
        self._state: dict[str, Any] = {}
        self._watch = drift.Watch()
        self._files: dict[int, Any] = {}  # references to those of the versions that are held
        present = await self._ask(Told({}, "", {}, {}))
        champion = await self._batcher(present, present.version)
        # Half of the time that an answer may take: the champion has the other.
        self._versions = Versions(champion, self._config.limits.timeout_s / 2)
        self._held = {present.version: champion}
        self._counts.serves(name, present.version)
        self._following = asyncio.create_task(self._follow(present))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for it here, in the replica, when ``__init__`` is done."""
        app = api.build(
            self,
            limits=self._config.limits,
            keyring=self._keyring,
            counts=self._counts,
            log=self._log,
            echo=False,
            explain=self._config.explain,
        )
        if self._config.replicas.min == self._config.replicas.max:
            short.offer(app)
        return app

    def __del__(self) -> None:
        self._log.flush()

    @property
    def answering(self) -> tuple[Runtime, ...]:
        """The versions that answer now, the champion first."""
        return self._versions.answering

    @property
    def sticky(self) -> str:
        """Header by which a caller stays with one version, or ""."""
        return self._versions.sticky

    @property
    def problem(self) -> str:
        """What keeps it from following its alias, or ""."""
        return self._problem

    @property
    def state(self) -> dict[str, Any]:
        """Of what is tried beside the champion."""
        return self._state

    async def infer(
        self, columns: Columns, caller: str, version: str | None = None
    ) -> tuple[Runtime, Floats]:
        """See `Versions.infer`."""
        self._predicted_s = time.monotonic()
        runtime, found = await self._versions.infer(columns, caller, version)
        self._watch.look((held.runtime for held in self._held.values()), columns)
        return runtime, found

    async def explain(
        self, runtime: Runtime, columns: Columns, method: str | None, target: str | None
    ) -> str:
        """Why a version answers each row so; see `api.Predictor`."""
        files = self._files[runtime.version]
        beside = time.monotonic() < self._predicted_s + PREDICTS_S
        question = Question(runtime.name, runtime.version, files, columns, method, target, beside)
        return await self._questions.ask(question)

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

    async def _ask(self, told: Told) -> Present:
        present: Present = await self._follower.present.remote(self._id, told)
        if self._keyring is not None:
            self._keyring.replace(present.keys, replicas=present.replicas)
        return present

    async def _batcher(self, present: Present, version: int) -> Batcher:
        self._files[version] = present.files[version]
        files = await present.files[version]
        device = "cuda" if self._config.gpus else ""
        runtime = await asyncio.to_thread(_load, files, self._name, version, device)
        plan = await asyncio.to_thread(sweep.plan, runtime, self._config.batch)
        logger.info("version %s: %s", version, plan)
        return Batcher(runtime, rows=plan.rows, wait_s=plan.wait_s, brief=plan.brief)

    async def _follow(self, present: Present) -> None:
        """Change to what is named anew; requests go on meanwhile."""
        while True:
            # Whatever goes wrong, it asks again, and later: keys are revoked here too.
            try:
                await self._change(present)
            except Exception as error:
                self._cannot_follow(error)
            await asyncio.sleep(ASK_S)
            try:
                present = await self._tell()
            except Exception as error:
                self._cannot_follow(error)

    def _cannot_follow(self, error: Exception) -> None:
        # What went wrong names files and holds traces: it is for the log.
        logger.warning("cannot follow: %s", error)
        self._problem = f"cannot follow, see the log: {type(error).__name__}"

    async def _tell(self) -> Present:
        """What it has counted, for what is so now."""
        attempt, tally = self._versions.take()
        seen = self._watch.take()
        told = Told(self._counts.snapshot(), attempt, tally, dict(self._refused), seen)
        try:
            return await self._ask(told)
        except BaseException:
            self._versions.give_back(attempt, tally)
            self._watch.give_back(seen)
            raise

    async def _change(self, present: Present) -> None:
        """Hold the versions that are named, and answer with those that take the same requests.

        Raises:
            RayError, OSError, MemoryError: when one cannot be had now; the others answer.
        """
        canary, shadow = present.canary, present.shadow
        named = [present.version, canary and canary.version, shadow]
        failed: Exception | None = None
        for version in named:
            known = version in self._held or version in self._refused
            if version and version in present.files and not known:
                try:
                    await self._hold(present, version)
                except (RayError, OSError, MemoryError) as error:
                    failed = error
        self._problem = present.problem or "; ".join(
            self._refused[v] for v in dict.fromkeys(named) if v in self._refused
        )
        self._state = present.state
        before = self._versions.champion
        champion = self._held.get(present.version, before)
        tried = self._held.get(canary.version) if canary else None
        copied = self._held.get(shadow) if shadow else None
        if tried is champion:  # promoted, before what is tried was ended
            tried = None
        if copied is champion or copied is tried:  # compared with the champion already
            copied = None
        self._versions.change(
            champion,
            (canary, tried) if canary and tried else None,
            copied.runtime if copied else None,
        )
        if champion is not before:
            self._counts.serves(self._name, champion.runtime.version)
        kept = {champion.runtime.version, *named}
        self._held = {v: batcher for v, batcher in self._held.items() if v in kept}
        # As they are now: another follower has files of its own.
        self._files = {v: present.files.get(v, self._files[v]) for v in self._held}
        self._refused = {v: text for v, text in self._refused.items() if v in kept}
        if failed is not None:
            raise failed

    async def _hold(self, present: Present, version: int) -> None:
        """Load a version, if it takes the columns and answers the classes that this endpoint has.

        Raises:
            RayError, OSError, MemoryError: when it cannot be had now.
        """
        schema = self._versions.champion.runtime.schema
        try:
            made = await self._batcher(present, version)
        except (RayError, OSError, MemoryError):
            raise
        except Exception as error:  # by the kind of model, its runtime has errors of its own
            logger.warning("version %s cannot be loaded: %s", version, error)
            text = f"version {version} cannot be loaded, see the log"
            self._refused[version] = f"{text}: {type(error).__name__}"
            return
        theirs = made.runtime.schema
        if _types(theirs) == _types(schema):
            self._held[version] = made
            return
        self._refused[version] = (
            f"version {version} takes other columns or answers other classes: "
            "start its endpoint anew"
        )


def _load(files: Files, name: str, version: int, device: str) -> Runtime:
    """A version from its files, warm.

    Raises:
        LeptonRayError: see `Runtime.load`.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        runtime = Runtime.load(Path(folder), name=name, version=version, device=device)
    runtime.warm_up()
    return runtime


def _types(schema: Schema) -> list[tuple[Any, ...]]:
    """What a request's columns must be, and what is answered; ranges, categories, ids and items may
    differ between versions."""
    columns = [(c.name, c.kind, c.shape, c.longest, c.optional, c.format) for c in schema.columns]
    return [*columns, (schema.task, schema.classes, schema.horizon)]
