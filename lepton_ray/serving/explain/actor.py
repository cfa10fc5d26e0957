"""Explanations in a Serve deployment of their own, so that they cannot slow predictions.

No ``from __future__ import annotations`` here: Serve inspects the class.
"""

import asyncio
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig

from lepton_ray.priority import give_way
from lepton_ray.serving.explain import answers
from lepton_ray.serving.files import Files, write_files
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import Columns

if TYPE_CHECKING:
    from lepton_ray.serving.explain.explainer import Explainer

WAITING = 16  # requests, beyond which one is sent away
LATER_S = 5.0  # after which whoever was sent away may come again
REST_S = 0.1  # between two explanations, at most
# Never reached: where a replica is full, those that predict ask it all the time whether it still
# is, which took each of them a quarter of a processor.
MAX_ONGOING = 10_000
IDLE_S = 120.0  # without a request, after which the replica goes
VERSIONS = 2  # that are kept open: with a canary two answer at a time


def application(name: str) -> serve.Application:
    """Bound into an endpoint's application; there is no replica before the first request."""
    deployment: Any = serve.deployment(Explaining)
    bound: serve.Application = deployment.options(
        name=f"{name}-explain",
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=WAITING,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        # No share of the processors: it lives from what predictions leave, and has always room.
        ray_actor_options={"num_cpus": 0},
        autoscaling_config={
            "min_replicas": 0,
            "initial_replicas": 0,
            "max_replicas": 1,
            "upscale_delay_s": 0,
            "downscale_delay_s": IDLE_S,
        },
    ).bind()
    return bound


class Explaining:
    """The replica: holds the versions that it was asked about last."""

    def __init__(self) -> None:
        import torch

        give_way()
        torch.set_num_threads(1)
        self._versions: dict[int, asyncio.Task[Explainer]] = {}
        self._asked = 0
        self._rested = 0.0  # when, by the monotonic clock
        # One thread: the work stays off the event loop, which answers health checks.
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=_have_what_is_left)

    async def explain(
        self,
        model: str,
        version: int,
        files: list[ray.ObjectRef[Files]],
        columns: Columns,
        method: str | None,
        target: str | None,
    ) -> str:
        """See `Explainer.explain`.

        Args:
            files: of the version, as a reference in a list.

        Returns:
            See `answers.to_json`. A replica that predicts hands it on as it is.

        Raises:
            RefusedError: 429 when too many are waiting.
        """
        if self._asked > WAITING:
            raise too_many()
        self._asked += 1
        try:
            explainer = await self._explainer(version, files[0])
            asked = explainer, model, version, columns, method, target
            run = asyncio.get_running_loop().run_in_executor
            return await run(self._thread, self._explain, *asked)
        finally:
            self._asked -= 1

    def _explain(
        self,
        explainer: "Explainer",
        model: str,
        version: int,
        columns: Columns,
        method: str | None,
        target: str | None,
    ) -> str:
        """Rests before it as long as the last one worked, up to `REST_S`.

        Replicas that predict read each question and hand it on, whatever the priority here: where
        short explanations followed each other without a rest, the 99th percentile of predictions
        on two processors was more than twice what it is alone, and 1.5 times with it.
        """
        time.sleep(max(0.0, self._rested - time.monotonic()))
        start = time.thread_time()
        try:
            return answers.to_json(model, version, explainer.explain(columns, method, target))
        finally:
            self._rested = time.monotonic() + min(time.thread_time() - start, REST_S)

    async def _explainer(self, version: int, files: ray.ObjectRef[Files]) -> "Explainer":
        """Opened by whoever asks first."""
        if version not in self._versions:
            self._versions[version] = asyncio.create_task(self._open(files))
            for old in list(self._versions)[:-VERSIONS]:
                del self._versions[old]
        opening = self._versions[version]
        try:
            return await asyncio.shield(opening)  # the others need it if this one goes away
        except Exception:
            if self._versions.get(version) is opening:
                del self._versions[version]
            raise

    async def _open(self, files: ray.ObjectRef[Files]) -> "Explainer":
        content = await files
        return await asyncio.get_running_loop().run_in_executor(self._thread, _load, content)


def too_many() -> RefusedError:
    text = "too many explanations are waiting: come again later"
    return RefusedError(429, text, retry_after_s=LATER_S)


def _have_what_is_left() -> None:
    """What predicts has the processor first, also where Ray made it as nice as `give_way` makes the
    rest of this replica: this thread has what is left."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _load(files: Files) -> "Explainer":
    # Here, since replicas that predict load this module too, and do without torch.
    from lepton_ray.serving.explain.explainer import Explainer

    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        return Explainer.load(Path(folder))
