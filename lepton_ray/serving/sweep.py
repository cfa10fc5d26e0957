"""How many rows go through a model together: measured when a version is loaded, then chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping

from lepton_ray.config.schema import Batching
from lepton_ray.serving.runtime import Runtime

REPEATS = 3  # of which the quickest counts: what else the machine does only makes it slower
SHARE = 0.25  # of the p99: a request may wait for the batch before its own, and for its answer
NEARLY = 0.05  # a smaller batch is as good when a row in it costs so little more
HANDOVER_S = 1e-4  # to the thread of the model and back, for each batch
WORTH = 0.5  # others are waited for when a row in company costs less than so much of one alone


def measure(runtime: Runtime, largest: int, p99_s: float) -> dict[int, float]:
    """Rows -> seconds of one forward pass, up to the size that takes too long."""
    table: dict[int, float] = {}
    size = 1
    while size < 2 * largest:
        rows = min(size, largest)
        table[rows] = min(_time(runtime, rows) for _ in range(REPEATS))
        if table[rows] > SHARE * p99_s:
            break
        size *= 2
    return table


def _time(runtime: Runtime, rows: int) -> float:
    start = time.perf_counter()
    runtime.warm_up(rows)
    return time.perf_counter() - start


def choose(table: Mapping[int, float], p99_s: float) -> tuple[int, float]:
    """Rows of a batch at most, and seconds that one which is not full waits under load.

    The smallest batch in which a row is nearly as cheap as in any whose forward pass leaves time
    for the p99; and no waiting, or as long as one row takes alone, where that makes rows cheaper.
    """
    quick = [rows for rows, seconds in table.items() if seconds <= SHARE * p99_s] or [min(table)]
    cost = {rows: (table[rows] + HANDOVER_S) / rows for rows in quick}
    limit = min(cost.values()) * (1 + NEARLY)
    rows = min(rows for rows in quick if cost[rows] <= limit)
    alone = table[min(table)]
    return rows, alone if table[rows] / rows < WORTH * alone else 0.0


def plan(runtime: Runtime, batch: Batching) -> tuple[int, float]:
    """What `choose` says, but for what the experiment says itself."""
    rows, wait_s = batch.max, batch.wait_ms
    if rows == "auto" or wait_s == "auto":
        p99_s = batch.p99_ms / 1000
        chosen, chosen_wait_s = choose(measure(runtime, batch.largest, p99_s), p99_s)
        rows = chosen if rows == "auto" else rows
        return rows, chosen_wait_s if wait_s == "auto" else wait_s / 1000
    return rows, wait_s / 1000
