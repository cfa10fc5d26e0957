"""Explanations in a Serve deployment of their own, so that they cannot slow predictions.

No ``from __future__ import annotations`` here: Serve inspects the class.
"""

import asyncio
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig

from lepton_ray.priority import give_way
from lepton_ray.serving.explain.answers import Explanation
from lepton_ray.serving.files import Files, write_files
from lepton_ray.serving.requests import Columns

if TYPE_CHECKING:
    from lepton_ray.serving.explain.explainer import Explainer

WAITING = 16  # requests, beyond which one is sent away
IDLE_S = 120.0  # without a request, after which the replica goes
VERSIONS = 2  # that are kept open: with a canary two answer at a time


def application(name: str) -> serve.Application:
    """Bound into an endpoint's application; there is no replica before the first request."""
    deployment: Any = serve.deployment(Explaining)
    bound: serve.Application = deployment.options(
        name=f"{name}-explain",
        max_ongoing_requests=1,
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
        self._versions: dict[int, Explainer] = {}
        # One thread: the work stays off the event loop, which answers health checks.
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=_have_what_is_left)

    async def explain(
        self,
        version: int,
        files: list[ray.ObjectRef[Files]],
        columns: Columns,
        method: str | None,
        target: str | None,
    ) -> list[Explanation]:
        """See `Explainer.explain`.

        Args:
            files: of the version, as a reference in a list.
        """
        loop = asyncio.get_running_loop()
        explainer = self._versions.get(version)
        if explainer is None:
            content = await files[0]
            explainer = await loop.run_in_executor(self._thread, _load, content)
            self._versions[version] = explainer
            for old in list(self._versions)[:-VERSIONS]:
                del self._versions[old]
        return await loop.run_in_executor(self._thread, explainer.explain, columns, method, target)


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
