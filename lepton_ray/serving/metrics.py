"""What an endpoint counts, and how the counts of its replicas become one page for Prometheus.

A scrape reaches one replica, whichever the proxy chooses. A label per replica would not help:
each series would be seen now and then only, and Prometheus would take the gaps for the end of it.
Ray's own metrics (``ray.util.metrics``) reach Prometheus through an agent on each node, on other
ports and without keys. So each replica gives its counts to the endpoint's one `follower.Follower`
every second, beside what they say to each other anyway, and the replica that is scraped asks it for
the sum. Nothing is sent per request. What a replica that is gone has counted stays in the sum, so a
counter never falls; only when the follower itself is restarted does it start over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from lepton_ray.serving.drift import Drifts
from lepton_ray.tracking.canary import Tally

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """One metric: its type, its help, and the value of each sample by name and labels."""

    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)


Snapshot = dict[str, Family]


class Metrics:
    """Of one replica, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        at = self._registry
        self._requests = Counter(
            "lepton_ray_requests",
            "Requests answered; version is empty where no model answered.",
            ["route", "status", "version"],
            registry=at,
        )
        self._seconds = Histogram(
            "lepton_ray_request_seconds",
            "From a request's arrival in a replica to the end of its answer.",
            ["route"],
            buckets=BUCKETS_S,
            registry=at,
        )
        self._rows = Counter("lepton_ray_rows", "Rows predicted.", ["version"], registry=at)
        self._failures = Counter(
            "lepton_ray_failures", "Requests that ended in an unexpected error (500).", registry=at
        )
        self.in_flight = Gauge("lepton_ray_in_flight", "Requests in the replicas now.", registry=at)
        self._info = Gauge(
            "lepton_ray_model_info",
            "Replicas that answer with this version.",
            ["model", "version"],
            registry=at,
        )

        self._counters: dict[
            tuple[str, int, int, bool], tuple[Counter, Histogram, Counter | None]
        ] = {}

    def serves(self, model: str, version: int) -> None:
        """From now on this replica answers with this version."""
        self._info.clear()
        self._info.labels(model, str(version)).set(1)

    def answered(self, *, route: str, status: int, seconds: float, rows: int, version: int) -> None:
        """Count one request; version 0 where no model answered."""
        key = (route, status, version, rows > 0)
        if (counters := self._counters.get(key)) is None:  # kept, as to look them up takes long
            of = str(version) if version else ""
            counters = self._counters[key] = (
                self._requests.labels(route, str(status), of),
                self._seconds.labels(route),
                self._rows.labels(of) if rows and version else None,
            )
        requests, durations, counted = counters
        requests.inc()
        durations.observe(seconds)
        if counted:
            counted.inc(rows)
        if status == 500:
            self._failures.inc()

    def snapshot(self) -> Snapshot:
        """All values now."""
        return {
            metric.name: Family(
                metric.type,
                metric.documentation,
                {
                    (s.name, tuple(sorted(s.labels.items()))): s.value
                    for s in metric.samples
                    if not s.name.endswith("_created")  # when; has no sum
                },
            )
            for metric in self._registry.collect()
        }


def total(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Sample by sample; counters, histograms and our gauges all add up."""
    result: Snapshot = {}
    for snapshot in snapshots:
        for name, family in snapshot.items():
            into = result.setdefault(name, Family(family.kind, family.help)).samples
            for sample, value in family.samples.items():
                into[sample] = into.get(sample, 0.0) + value
    return result


def without_gauges(snapshot: Snapshot) -> Snapshot:
    """What stays of a replica that is gone: nothing is in flight there."""
    return {name: family for name, family in snapshot.items() if family.kind != "gauge"}


def of_tally(tally: Tally) -> Snapshot:
    """What is counted of the versions of a canary and a shadow."""
    helps = {
        "requests": "Requests of a version that is tried, or is compared with one, since it is.",
        "errors": "Of these, requests that the version failed at and the champion did not.",
        "compared": "Rows that a version and the champion both answered.",
        "agreed": "Of these, rows with the same label, or a value that is near.",
        "dropped": "Copies of requests that were not made, because there was no time.",
    }
    found: Snapshot = {}
    for name, text in helps.items() if tally else ():
        full = f"lepton_ray_tried_{name}"
        found[full] = Family("gauge", text)
        for version, counts in tally.items():
            found[full].samples[(full, (("version", str(version)),))] = getattr(counts, name)
    return found


def of_drifts(drifts: Drifts) -> Snapshot:
    """How far requests are from the training data of the versions."""
    helps = {
        "psi": ("", "Population stability index of a column's latest values, of a sample."),
        "unseen": ("_unseen", "Share of these values whose like the training data do not have."),
        "rows": ("_rows", "How many these values are."),
    }
    found: Snapshot = {}
    for name, (end, text) in helps.items() if drifts else ():
        full = f"lepton_ray_drift{end}"
        found[full] = Family("gauge", text)
        for version, columns in drifts.items():
            for column, drift in columns.items():
                labels = (("column", column), ("version", str(version)))
                found[full].samples[(full, labels)] = getattr(drift, name)
    return found


def page(snapshot: Snapshot) -> bytes:
    """Prometheus' text form, of `CONTENT_TYPE`."""
    registry = CollectorRegistry()
    registry.register(_Given(snapshot))
    return generate_latest(registry)


class _Given:
    """What `generate_latest` can read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, family in self._snapshot.items():
            metric = Metric(name, family.help, family.kind)
            for (sample, labels), value in family.samples.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
