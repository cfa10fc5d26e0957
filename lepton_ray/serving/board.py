"""What the replicas of an endpoint tell, for as long as it may be asked for."""

from __future__ import annotations

from lepton_ray.serving import metrics
from lepton_ray.serving.metrics import Snapshot

GONE_S = 10.0  # a replica that has not asked for so long has ended, as far as anyone can see
FORGET_S = 600.0  # after which it cannot come back, and its counts go into one sum with the others


class Board:
    """What the replicas have counted, and how many there are."""

    def __init__(self) -> None:
        self._forgotten: Snapshot = {}
        self._last: dict[str, tuple[float, Snapshot]] = {}

    def note(self, replica: str, counted: Snapshot, now_s: float) -> None:
        """A replica's counts; they take the place of its last ones."""
        self._last[replica] = (now_s, counted)
        for name, (at, last) in list(self._last.items()):
            if now_s - at > FORGET_S:
                self._forgotten = metrics.total([self._forgotten, metrics.without_gauges(last)])
                del self._last[name]

    def replicas(self, now_s: float) -> int:
        """How many there are, at least 1."""
        return max(1, sum(now_s - at <= GONE_S for at, _ in self._last.values()))

    def totals(self, now_s: float) -> Snapshot:
        """Of all that are and were: what one has counted is not undone by its end."""
        return metrics.total(
            [
                self._forgotten,
                *(
                    counted if now_s - at <= GONE_S else metrics.without_gauges(counted)
                    for at, counted in self._last.values()
                ),
            ]
        )
