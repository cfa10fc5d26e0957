"""Who has a processor first: what answers requests, then what looks after it, then what computes.

Ray makes all of its workers nice (15), replicas of endpoints too, which then wait for whatever else
runs. Where we start Ray, its workers are not, and those that compute or look after others are by
this.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable

COMPUTES = 15
LOOKS_AFTER = 10
RAY = {"RAY_worker_niceness": "0"}
"""The environment of a Ray that we start, on a laptop or by `cluster/`."""


def give_way() -> None:
    """Make this thread, and those that it will start, nice."""
    if sys.platform != "linux":  # elsewhere it is the whole process
        return
    _make_nice([threading.get_native_id()], COMPUTES)


def look_after(process: int | None = None) -> None:
    """Make all threads of a process that only looks after others a little nice.

    On a processor that an endpoint shares with them, such processes doubled its 99th percentile.

    Args:
        process: its id; default this one.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(FileNotFoundError):  # it has ended
        threads = os.listdir(f"/proc/{process or os.getpid()}/task")
        _make_nice(map(int, threads), LOOKS_AFTER)


def _make_nice(threads: Iterable[int], niceness: int) -> None:
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
