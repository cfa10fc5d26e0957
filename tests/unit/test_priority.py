"""Threads that compute are nice, and leave others of their process as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lepton_ray.priority import COMPUTES, LOOKS_AFTER, give_way, look_after

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness here")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_that_computes_gives_way_and_so_do_those_it_starts() -> None:
    before = niceness()

    def started() -> int:
        with ThreadPoolExecutor(1) as others:
            return others.submit(niceness).result()

    with ThreadPoolExecutor(1, initializer=give_way) as nice:
        assert nice.submit(niceness).result() == COMPUTES
        assert nice.submit(started).result() == COMPUTES
    assert niceness() == before


def test_who_is_nicer_stays_so() -> None:
    """To be less nice takes a right that few have."""

    def nicer() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        give_way()
        return niceness()

    with ThreadPoolExecutor(1) as others:
        assert others.submit(nicer).result() == 19


def test_a_process_that_looks_after_others_is_nice_with_all_its_threads() -> None:
    code = (
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print('started', flush=True)\n"
        "input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        threads = [int(t) for t in os.listdir(f"/proc/{other.pid}/task")]
        assert len(threads) == 2
        look_after(other.pid)
        assert {os.getpriority(os.PRIO_PROCESS, t) for t in threads} == {LOOKS_AFTER}
        other.communicate(b"\n")
    look_after(other.pid)  # one that has ended
