"""What a reference names now, for the replicas of an endpoint; and what they know of each other.

One actor asks the registry and reads the file of keys; replicas ask the actor, and get a version's
files as bytes, so that they need neither MLflow nor a file system in common. When they ask, they
tell what they have counted (see `metrics`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.errors import LeptonRayError, ServingError
from lepton_ray.serving import keys, metrics
from lepton_ray.serving.keys import Key
from lepton_ray.serving.metrics import Snapshot
from lepton_ray.tracking import registry, store

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at the registry

GONE_S = 10.0  # a replica that has not asked for so long has ended, as far as anyone can see
FORGET_S = 600.0  # after which it cannot come back, and its counts go into one sum with the others

Files = dict[str, bytes]


@dataclass(frozen=True)
class KeySource:
    """Where an endpoint's keys are."""

    path: Path
    extra: tuple[Key, ...] = ()
    """Accepted besides those of the file."""

    def read(self) -> tuple[Key, ...]:
        """
        Raises:
            ServingError: when the file cannot be used.
        """
        return (*keys.read(self.path), *self.extra)


@dataclass(frozen=True)
class Present:
    """What a replica must know."""

    version: int
    files: ray.ObjectRef[Files]
    keys: tuple[Key, ...]
    replicas: int
    """That have asked lately, at least 1."""
    problem: str
    """With the keys, or ""."""


class Board:
    """What the replicas have counted, and how many there are."""

    def __init__(self) -> None:
        self._forgotten: Snapshot = {}
        self._last: dict[str, tuple[float, Snapshot]] = {}

    def note(self, replica: str, counted: Snapshot, now_s: float) -> None:
        """A replica's counts; they take the place of its last ones."""
        self._last[replica] = (now_s, counted)
        for name, (at, last) in list(self._last.items()):
            if now_s - at > FORGET_S:
                self._forgotten = metrics.total([self._forgotten, metrics.without_gauges(last)])
                del self._last[name]

    def replicas(self, now_s: float) -> int:
        """How many there are, at least 1."""
        return max(1, sum(now_s - at <= GONE_S for at, _ in self._last.values()))

    def totals(self, now_s: float) -> Snapshot:
        """Of all that are and were: what one has counted is not undone by its end."""
        return metrics.total(
            [
                self._forgotten,
                *(
                    counted if now_s - at <= GONE_S else metrics.without_gauges(counted)
                    for at, counted in self._last.values()
                ),
            ]
        )


class Follower:
    """Follows ``name@alias``; ``name/version`` never changes.

    Args:
        version, files: what the reference named when the endpoint was asked for; the files as a
            reference in a list.
        key_source: None where no keys are needed.
    """

    def __init__(
        self,
        reference: str,
        version: int,
        files: list[ray.ObjectRef[Files]],
        key_source: KeySource | None = None,
    ) -> None:
        self._reference = reference
        self._version = version
        (self._files,) = files
        self._key_source = key_source
        self._keys: tuple[Key, ...] = ()
        self._problem = ""
        self._board = Board()
        self._following: asyncio.Task[None] | None = None
        self._read_keys()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._read_keys()
            if "@" not in self._reference:
                continue
            try:
                await asyncio.to_thread(self._look)
            except (LeptonRayError, OSError) as error:  # the registry may be back at the next look
                logger.warning("cannot follow %s: %s", self._reference, error)

    def _look(self) -> None:
        found = registry.resolve(self._reference)
        if found.version != self._version:
            files = ray.put(read_files(found.folder()))
            self._files, self._version = files, found.version

    def _read_keys(self) -> None:
        if self._key_source is None:
            return
        try:
            self._keys, self._problem = self._key_source.read(), ""
        except ServingError as error:  # whom it lets in is not known, so it lets in nobody
            logger.warning("no key is accepted: %s", error)
            self._keys, self._problem = (), "the key file cannot be read: no key is accepted"

    async def present(self, replica: str, counted: Snapshot) -> Present:
        """What is so now, for a replica that tells what it has counted."""
        if self._following is None:  # at the first call, or a restart's
            self._following = asyncio.create_task(self._follow())
        now_s = time.monotonic()
        self._board.note(replica, counted, now_s)
        replicas = self._board.replicas(now_s)
        return Present(self._version, self._files, self._keys, replicas, self._problem)

    async def totals(self, replica: str, counted: Snapshot) -> Snapshot:
        """What all replicas have counted; the one that asks tells its own first."""
        now_s = time.monotonic()
        self._board.note(replica, counted, now_s)
        return self._board.totals(now_s)


def start(
    reference: str, version: registry.ModelVersion, key_source: KeySource | None
) -> tuple[Any, ray.ObjectRef[Files]]:
    """A follower on this node, where the registry can be reached.

    Returns:
        Its handle, which keeps it alive, and the files, which are to be kept as long: when it is
        restarted it begins with them again.
    """
    here = ray.get_runtime_context().get_node_id()
    files = ray.put(read_files(version.folder()))
    actor = (
        ray.remote(Follower)
        .options(
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": store.absolute_uri()}},
        )
        .remote(reference, version.version, [files], key_source)
    )
    return actor, files


def read_files(folder: Path) -> Files:
    """Every file of a version by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(files: Files, folder: Path) -> None:
    """The inverse of `read_files`."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
