"""A process beside the replica in which strangers' files are unpacked, with a limit on its memory.

Parquet and Arrow name sizes, offsets and repetitions that a few bytes can make as large as they
like, in more encodings than can be checked from outside. So the files are read where running out of
memory, or a crash of the parser, ends one request and not the replica.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from lepton_ray.serving.refusals import RefusedError

T = TypeVar("T")
PAGE_BYTES = resource.getpagesize()
# What is reserved ahead counts as taken: a GiB by Arrow's own allocator, 64 MiB a thread by glibc.
FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
# A fresh interpreter: a fork would copy locks that another thread holds, and multiprocessing's own
# way would run this process's main module again, which is Ray's worker or a person's script.
PROGRAM = (
    "import json, sys; sys.path = json.loads(sys.argv[3]); "
    "from lepton_ray.serving import sandbox; sandbox.work(int(sys.argv[1]), int(sys.argv[2]))"
)


class Sandbox:
    """One process, started for the first file; files go through it one at a time.

    Args:
        memory_bytes: that it may take beyond what Python and Arrow need to start (Linux only).
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._one = asyncio.Lock()
        self._worker: _Worker | None = None

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What the function returns there.

        Args:
            function: of a module, since it goes there by name.

        Raises:
            RefusedError: 422 when it took too much memory or ended the process.
            Exception: what the function raised.
        """
        async with self._one:
            # Given back only after its answer: a worker that was left in the middle would give the
            # next file the answer to this one.
            worker, self._worker = self._worker, None
            if worker is None:
                worker = await asyncio.to_thread(_Worker, self._memory_bytes)
            try:
                good, value = await asyncio.to_thread(worker.ask, function, args)
            except BaseException as error:
                worker.end()
                if isinstance(error, EOFError | OSError):
                    raise RefusedError(
                        422, "the body cannot be unpacked: it is damaged, or too large unpacked"
                    ) from None
                raise
            self._worker = worker
        if not good:
            raise value
        result: T = value
        return result

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.end()


class _Worker:
    """The process, and this end of its pipe; when nobody holds it any more, both end."""

    def __init__(self, memory_bytes: int) -> None:
        self._pipe, theirs = Pipe()
        number = theirs.fileno()
        words = [str(number), str(memory_bytes), json.dumps(sys.path)]
        with theirs:  # closed here, so that the death of either end is seen by the other
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words],
                pass_fds=[number],
                env={**os.environ, **FRUGAL},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the others
            )

    def ask(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._pipe.send((function, args))
        return self._pipe.recv()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def work(number: int, memory_bytes: int) -> None:
    """What the process does until the other end closes.

    Args:
        number: of the file that is its end of the pipe.
    """
    import pyarrow
    import pyarrow.parquet

    from lepton_ray.serving import tables  # noqa: F401 - before the limit, which counts from here

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * PAGE_BYTES + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe = Connection(number)
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
