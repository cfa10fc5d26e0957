"""The versions that a replica holds: who answers a request, and what is counted of each.

The champion answers, or the canary for its share of callers. A request at which the canary fails is
answered by the champion. Copies, to a shadow and to compare a canary with the champion, run beside
the answer in a thread of low priority, and are dropped and counted when there is no time for them.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lepton_ray.config.schema import Rule
from lepton_ray.priority import give_way
from lepton_ray.serving.batcher import Batcher, length
from lepton_ray.serving.requests import Columns
from lepton_ray.serving.runtime import CHUNK, Floats, Runtime
from lepton_ray.tracking.canary import Canary, Counts, Tally, add, goes_to_canary

COPIES = 64  # that wait at a time


@dataclass(frozen=True)
class Copy:
    """Rows that were answered, for another version to answer too."""

    columns: Columns
    of: Runtime
    """That answered."""
    found: Floats
    by: Runtime
    counted_of: int
    """The version whose agreement with the champion this tells."""


class Versions:
    """Of one replica. Needs a running event loop.

    Args:
        patience_s: for an answer of the canary, after which the champion is asked.

    Attributes:
        champion: the version that answers whoever does not go to the canary.
    """

    def __init__(self, champion: Batcher, patience_s: float) -> None:
        self.champion = champion
        self._patience_s = patience_s
        self._canary: tuple[Canary, Batcher] | None = None
        self._shadow: Runtime | None = None
        self._tally: Tally = {}
        self._copies: asyncio.Queue[Copy] = asyncio.Queue(COPIES)
        self._copying: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=give_way)

    @property
    def answering(self) -> tuple[Runtime, ...]:
        """The champion, then the canary if there is one."""
        canary = (self._canary[1].runtime,) if self._canary else ()
        return (self.champion.runtime, *canary)

    @property
    def sticky(self) -> str:
        """Header by which a caller stays with one version, or ""."""
        return self._canary[0].sticky if self._canary else ""

    @property
    def attempt(self) -> str:
        """The id of the canary that is counted, or ""."""
        return self._canary[0].id if self._canary else ""

    def change(
        self, champion: Batcher, canary: tuple[Canary, Batcher] | None, shadow: Runtime | None
    ) -> None:
        """From now on these answer; requests that are under way end with those they began with."""
        before = self.attempt
        self.champion, self._canary, self._shadow = champion, canary, shadow
        if self.attempt != before:
            self._tally = {}

    async def infer(
        self, columns: Columns, caller: str, version: str | None = None
    ) -> tuple[Runtime, Floats]:
        """The version that answered, and [n, classes] probabilities or [n, 1] values.

        Args:
            caller: whoever is the same gets the same version.
            version: the only one that may answer, where one was asked for.
        """
        champion, tried, shadow = self.champion, self._canary, self._shadow
        if tried is not None and _chosen(*tried, caller, version):
            answered = await self._try(*tried, champion, columns)
        elif tried is None and shadow is None:
            return champion.runtime, await champion.run(columns)
        else:
            start = time.perf_counter()
            answered = champion.runtime, await champion.run(columns)
            self._of(champion.runtime).answered(time.perf_counter() - start)
        if shadow is not None and answered[0] is champion.runtime:
            self._copy(Copy(columns, *answered, shadow, shadow.version))
        return answered

    async def _try(
        self, canary: Canary, batcher: Batcher, champion: Batcher, columns: Columns
    ) -> tuple[Runtime, Floats]:
        start = time.perf_counter()
        found = await _finite(batcher, columns, self._patience_s)
        seconds = time.perf_counter() - start
        mine = self.attempt == canary.id  # else it has ended meanwhile
        if found is not None:
            if mine:
                self._of(batcher.runtime).answered(seconds)
                self._copy(Copy(columns, batcher.runtime, found, champion.runtime, canary.version))
            return batcher.runtime, found
        answer = await champion.run(columns)
        if mine and champion.runtime.answered(answer).all():  # else the rows are what is wrong
            counts = self._of(batcher.runtime)
            counts.answered(seconds)
            counts.errors += 1
        return champion.runtime, answer

    def take(self) -> tuple[str, Tally]:
        """The attempt, and what was counted since the last time."""
        taken, self._tally = self._tally, {}
        return self.attempt, taken

    def give_back(self, attempt: str, taken: Tally) -> None:
        """What was taken could not be told."""
        if attempt == self.attempt:
            self._tally = add([taken, self._tally])

    def _of(self, runtime: Runtime) -> Counts:
        return self._tally.setdefault(runtime.version, Counts())

    def _copy(self, copy: Copy) -> None:
        try:
            self._copies.put_nowait(copy)
        except asyncio.QueueFull:
            self._tally.setdefault(copy.counted_of, Counts()).dropped += 1
            return
        if self._copying is None:
            self._copying = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            copy, attempt = await self._copies.get(), self.attempt
            columns = {name: values[:CHUNK] for name, values in copy.columns.items()}
            start = time.perf_counter()
            try:
                found = await loop.run_in_executor(self._thread, copy.by.predict_columns, columns)
                good = bool(copy.by.answered(found).all())
            except Exception:
                good = False
            if attempt != self.attempt or not copy.of.answered(copy.found).all():
                continue
            counts = self._tally.setdefault(copy.counted_of, Counts())
            if copy.by.version == copy.counted_of:  # a shadow, which has no requests of its own
                counts.answered(time.perf_counter() - start)
                counts.errors += not good
            if good:
                rule = self._canary[0].rule if self._canary else Rule()
                agreed = copy.by.agree(found, copy.of, copy.found[:CHUNK], rule.tolerance)
                counts.compared += length(columns)
                counts.agreed += agreed


def _chosen(canary: Canary, batcher: Batcher, caller: str, version: str | None) -> bool:
    if version is not None:
        return version == str(batcher.runtime.version)
    return goes_to_canary(canary, caller)


async def _finite(batcher: Batcher, columns: Columns, patience_s: float) -> Floats | None:
    """Its answer; None where it has none in time."""
    try:
        async with asyncio.timeout(patience_s):
            found = await batcher.run(columns)
    except Exception:
        return None
    return found if batcher.runtime.answered(found).all() else None
