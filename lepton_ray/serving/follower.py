"""What a reference names now, for the replicas of an endpoint.

One actor asks the registry; replicas ask the actor, and get a version's files as bytes, so that
they need neither MLflow nor a file system in common.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.errors import LeptonRayError
from lepton_ray.tracking import registry, store

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at the registry

Files = dict[str, bytes]


class Follower:
    """Follows ``name@alias``; ``name/version`` never changes.

    Args:
        version, files: what the reference named when the endpoint was asked for.
    """

    def __init__(self, reference: str, version: int, files: Files) -> None:
        self._reference = reference
        self._version = version
        self._files: ray.ObjectRef[Files] = ray.put(files)
        self._following: asyncio.Task[None] | None = None

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self._look)
            except (LeptonRayError, OSError) as error:  # the registry may be back at the next look
                logger.warning("cannot follow %s: %s", self._reference, error)

    def _look(self) -> None:
        found = registry.resolve(self._reference)
        if found.version != self._version:
            files = ray.put(read_files(found.folder()))
            self._files, self._version = files, found.version

    async def current(self) -> tuple[int, ray.ObjectRef[Files]]:
        """The version, and a reference to its files."""
        if self._following is None and "@" in self._reference:  # at the first call, or a restart's
            self._following = asyncio.create_task(self._follow())
        return self._version, self._files


def start(reference: str, version: registry.ModelVersion) -> Any:
    """A follower on this node, where the registry can be reached; the handle keeps it alive."""
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Follower)
        .options(
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": store.absolute_uri()}},
        )
        .remote(reference, version.version, read_files(version.folder()))
    )


def read_files(folder: Path) -> Files:
    """Every file of a version by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(files: Files, folder: Path) -> None:
    """The inverse of `read_files`."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
