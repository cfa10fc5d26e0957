"""Requests of one version through its model together.

Whatever waits goes when the model is free: a request that finds it idle does not wait for others,
and under load batches grow by themselves, because requests gather while a batch is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lepton_ray.serving.requests import Columns
from lepton_ray.serving.runtime import Floats, Runtime


class Batcher:
    """Of one version in one replica. Needs a running event loop.

    Args:
        rows: in one forward pass at most.
        wait_s: how long a batch that is not full waits for more, where a row is cheaper in company.
            Only a batch that gathered while the model was busy does.
        brief: rows up to which a forward pass is so short that it goes on the event loop.
    """

    def __init__(self, runtime: Runtime, *, rows: int, wait_s: float = 0.0, brief: int = 0) -> None:
        self.runtime = runtime
        self._rows = rows
        self._wait_s = wait_s
        self._brief = brief
        self._waiting: deque[tuple[Columns, int, asyncio.Future[Floats]]] = deque()
        self._working: asyncio.Task[None] | None = None
        # A thread: a forward pass of any length stays off the event loop, which answers health
        # checks. One, as a replica has one CPU; each version its own, so that a slow one does not
        # hold up another; it ends when nobody has the batcher any more, a request least of all.
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, columns: Columns) -> Floats:
        """[n, classes] Probabilities or [n, 1] values of checked columns.

        More rows than a batch holds go through the model in parts, between which others have their
        turn.
        """
        n = length(columns)
        if n <= self._rows:
            return await self._queued(columns, n)
        parts = [
            await self._queued(_part(columns, at, at + self._rows), min(self._rows, n - at))
            for at in range(0, n, self._rows)
        ]
        return np.concatenate(parts)

    def _queued(self, columns: Columns, n: int) -> asyncio.Future[Floats]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Floats] = loop.create_future()
        self._waiting.append((columns, n, future))
        if self._working is None:
            self._working = loop.create_task(self._work())
        return future

    async def _work(self) -> None:
        busy = False
        while self._waiting:
            if busy and self._wait_s and sum(n for _, n, _ in self._waiting) < self._rows:
                await asyncio.sleep(self._wait_s)
            await self._answer(self._take())
            busy = True
        self._working = None

    def _take(self) -> list[tuple[Columns, asyncio.Future[Floats]]]:
        """The first that wait, as many as a batch holds."""
        taken: list[tuple[Columns, asyncio.Future[Floats]]] = []
        rows = 0
        while self._waiting and (not taken or rows + self._waiting[0][1] <= self._rows):
            columns, n, future = self._waiting.popleft()
            if not future.done():  # else its client went
                taken.append((columns, future))
                rows += n
        return taken

    async def _answer(self, taken: list[tuple[Columns, asyncio.Future[Floats]]]) -> None:
        if not taken:
            return
        merged = taken[0][0]
        if len(taken) > 1:
            merged = {name: np.concatenate([c[name] for c, _ in taken]) for name in merged}
        try:
            whole = await self._predict(merged)
        except Exception as error:
            if len(taken) > 1:  # one of them did it: the others are not to suffer
                for one in taken:
                    await self._answer([one])
            elif not taken[0][1].done():
                taken[0][1].set_exception(error)
            return
        at = 0
        for columns, future in taken:
            end = at + length(columns)
            if not future.done():
                future.set_result(whole[at:end])
            at = end

    async def _predict(self, columns: Columns) -> Floats:
        if length(columns) <= self._brief:
            return self.runtime.predict_columns(columns)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.runtime.predict_columns, columns)


def length(columns: Columns) -> int:
    """Rows."""
    return len(next(iter(columns.values())))


def _part(columns: Columns, start: int, end: int) -> Columns:
    return {name: values[start:end] for name, values in columns.items()}
