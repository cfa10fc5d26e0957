"""A process beside the replica in which strangers' files are unpacked, with a limit on its memory.

Parquet and Arrow name sizes, offsets and repetitions that a few bytes can make as large as they
like, in more encodings than can be checked from outside. So the files are read where running out of
memory, or a crash of the parser, ends one request and not the replica.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from lepton_ray.serving.refusals import RefusedError

T = TypeVar("T")
PAGE_BYTES = resource.getpagesize()


class Sandbox:
    """One process, started for the first file; files go through it one at a time.

    Args:
        memory_bytes: that it may take beyond what Python and Arrow need to start (Linux only).
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._one = asyncio.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What the function returns there.

        Args:
            function: of a module, since it goes there by name.

        Raises:
            RefusedError: 422 when it took too much memory or ended the process.
            Exception: what the function raised.
        """
        async with self._one:
            try:
                good, value = await asyncio.to_thread(self._ask, function, args)
            except (EOFError, OSError):
                self.close()
                raise RefusedError(
                    422, "the body cannot be unpacked: it is damaged, or too large unpacked"
                ) from None
            except BaseException:  # cancelled: the answer of this file is not that of the next
                self.close()
                raise
        if not good:
            raise value
        result: T = value
        return result

    def close(self) -> None:
        """End the process; the next file starts another."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if process is not None and pipe is not None:
            process.kill()
            process.join()
            pipe.close()

    def _ask(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._pipe is None:
            # A fresh interpreter: a fork would copy locks that another thread holds.
            context = multiprocessing.get_context("spawn")
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._memory_bytes), daemon=True)
            process.start()
            theirs.close()  # so that the death of either end is seen by the other
            self._process, self._pipe = process, pipe
        pipe = self._pipe
        pipe.send((function, args))
        return pipe.recv()


def _work(pipe: Connection, memory_bytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    from lepton_ray.serving import tables  # noqa: F401 - before the limit, which counts from here

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve a great deal ahead
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * PAGE_BYTES + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except Exception as error:
            answer = (False, error)
        pipe.send(answer)
        del function, args, answer
