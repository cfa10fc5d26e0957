"""What replicas see of requests' rows, and how far that is from the versions' training data.

Each replica counts a few rows a second in the bins of every version that it holds, whichever of
them answered, so that versions are compared on the same rows. The endpoint's follower adds these
up. Of a version that was made without bins, or of data that have none, there is no drift to tell.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from lepton_ray.data.drift import Bins, Drift
from lepton_ray.serving.requests import Columns
from lepton_ray.serving.runtime import Runtime

MANIFEST = "drift"
"""The key of a version's bins in its manifest."""
LOOK_S = 0.1  # between two looks
ROWS = 16  # of one request
COST = 100  # a look is followed by so many times its duration without one
LATEST = 10_000  # values of a column, from which on older ones count half as much, then a quarter

Seen = dict[int, dict[str, list[int]]]
"""Version -> column -> values in each of its bins."""
Drifts = dict[int, dict[str, Drift]]
"""Version -> column -> how far it is."""


def to_json(bins: Mapping[str, Bins]) -> dict[str, Any]:
    """For a manifest, where there are any."""
    return {MANIFEST: {name: b.to_json() for name, b in bins.items()}} if bins else {}


def read(manifest: Mapping[str, Any]) -> dict[str, Bins]:
    """A version's bins by column."""
    return {name: Bins.from_json(value) for name, value in manifest.get(MANIFEST, {}).items()}


class Watch:
    """Of one replica."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._bins: dict[int, dict[str, Bins]] = {}
        self._seen: Seen = {}

    def look(self, runtimes: Iterable[Runtime], columns: Columns) -> None:
        """Count some rows of a request, unless others were counted a moment ago."""
        start_s = time.monotonic()
        if start_s < self._next_s:
            return
        rows = len(next(iter(columns.values())))
        some = {name: values[:: -(-rows // ROWS)] for name, values in columns.items()}
        for runtime in runtimes:
            bins = self._bins.get(runtime.version)
            if bins is None:
                bins = self._bins[runtime.version] = read(runtime.manifest)
            if bins:
                found = runtime.measured(some)
                counts = {name: b.count(found[name]).tolist() for name, b in bins.items()}
                add(self._seen, {runtime.version: counts})
        end_s = time.monotonic()
        self._next_s = end_s + max(LOOK_S, COST * (end_s - start_s))

    def take(self) -> Seen:
        """What was counted since the last time."""
        taken, self._seen = self._seen, {}
        return taken

    def give_back(self, taken: Seen) -> None:
        """What was taken could not be told."""
        add(self._seen, taken)


def add(into: Seen, seen: Seen) -> None:
    """Add what was seen, of which the latest counts most."""
    for version, columns in seen.items():
        known = into.setdefault(version, {})
        for name, counts in columns.items():
            before = known.get(name) or [0] * len(counts)
            known[name] = [a + b for a, b in zip(before, counts, strict=True)]
            if sum(known[name]) > LATEST:
                known[name] = [n // 2 for n in known[name]]


def compare(bins: Mapping[int, Mapping[str, Bins]], seen: Seen) -> Drifts:
    """Each version's columns, the furthest first; those of which enough rows were seen."""
    found: Drifts = {}
    for version, columns in sorted(seen.items()):
        known = bins.get(version, {})
        drifts = {name: known[name].compare(c) for name, c in columns.items() if name in known}
        told = [(name, drift) for name, drift in drifts.items() if drift is not None]
        if told:
            found[version] = dict(sorted(told, key=lambda item: -item[1].psi))
    return found
