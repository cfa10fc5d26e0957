"""Who has a processor first: what answers requests and keeps a cluster together, not what computes.

Ray makes all of its workers nice (15), replicas of endpoints too, which then wait for whatever else
runs. Where we start Ray, its workers are not (`jobs.proxy`), and those that compute are by this.
"""

from __future__ import annotations

import os
import sys
import threading

COMPUTES = 15


def give_way() -> None:
    """Make this thread, and those that it will start, nice."""
    if sys.platform != "linux":  # elsewhere it is the whole process
        return
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < COMPUTES:
        os.setpriority(os.PRIO_PROCESS, thread, COMPUTES)
