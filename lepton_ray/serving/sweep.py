"""How many rows go through a model together: measured when a version is loaded, then chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lepton_ray.config.schema import Batching
from lepton_ray.serving.runtime import Runtime

REPEATS = 3  # of which the quickest counts: what else the machine does only makes it slower
SHARE = 0.25  # of the p99: a request may wait for the batch before its own, and for its answer
NEARLY = 0.05  # a smaller batch is as good when a row in it costs so little more
HANDOVER_S = 1e-4  # to the thread of the model and back, for each batch
WORTH = 0.5  # others are waited for when a row in company costs less than so much of one alone
# A pass that is shorter goes on the event loop itself, which spends as much on any request: the
# thread, with what else runs on its processor before each of two turns, would take longer.
BRIEF_S = 3e-4


@dataclass(frozen=True)
class Plan:
    """How requests go through a model."""

    rows: int
    """Of a batch at most."""
    wait_s: float
    """How long a batch that is not full waits for more, under load."""
    brief: int
    """Rows of which a forward pass is so short that it needs no thread; 0 for none."""


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


def choose(table: Mapping[int, float], p99_s: float) -> Plan:
    """By what forward passes take.

    The smallest batch in which a row is nearly as cheap as in any whose forward pass leaves time
    for the p99; and no waiting, or as long as one row takes alone, where that makes rows cheaper.
    """
    quick = [rows for rows, seconds in table.items() if seconds <= SHARE * p99_s] or [min(table)]
    cost = {rows: (table[rows] + HANDOVER_S) / rows for rows in quick}
    limit = min(cost.values()) * (1 + NEARLY)
    rows = min(rows for rows in quick if cost[rows] <= limit)
    alone = table[min(table)]
    wait_s = alone if table[rows] / rows < WORTH * alone else 0.0
    return Plan(rows, wait_s, max((n for n, s in table.items() if s <= BRIEF_S), default=0))


def plan(runtime: Runtime, batch: Batching) -> Plan:
    """What `choose` says, but for what the experiment says itself; nothing is measured where it
    says all, and every pass goes through the thread."""
    if batch.max != "auto" and batch.wait_ms != "auto":
        return Plan(batch.max, batch.wait_ms / 1000, 0)
    p99_s = batch.p99_ms / 1000
    chosen = choose(measure(runtime, batch.largest, p99_s), p99_s)
    if batch.max != "auto":
        chosen = replace(chosen, rows=batch.max)
    if batch.wait_ms != "auto":
        chosen = replace(chosen, wait_s=batch.wait_ms / 1000)
    if any(column.kind == "text" for column in runtime.schema.columns):
        # Its words are found before the pass, and that is not measured: a text may be long.
        chosen = replace(chosen, brief=0)
    return chosen
