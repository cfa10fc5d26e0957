"""A version tried beside the champion: whose request goes to it, and what becomes of it.

All of it is values and pure decisions: replicas route by `goes_to_canary` and count into `Counts`,
the endpoint's follower adds these up and acts on `decide`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lepton_ray.config.schema import Rule
from lepton_ray.data.drift import Drift

LEAST_S, STEP = 1e-4, 1.15  # of the buckets of latencies: the p99 is known to 15 %
CERTAIN = 1.96  # deviations, of which 97.5 % are to one side
FEWEST = 3  # one or two tell nothing before the end


@dataclass(frozen=True, kw_only=True)
class Canary:
    id: str
    """Of this attempt. It salts the choice of callers, so that another canary meets others."""
    version: int
    share: float
    instead_of: int
    """The champion it is compared with, and takes the place of."""
    started_s: float
    """Seconds since 1970."""
    minutes: float
    sticky: str
    rule: Rule

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rule": self.rule.model_dump()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Canary:
        return Canary(**{**value, "rule": Rule.model_validate(value["rule"])})


def goes_to_canary(canary: Canary, caller: str) -> bool:
    """Whether a caller's requests go there: on every replica the same, and with a larger share all
    who went there before."""
    digest = hashlib.blake2b(f"{canary.id}:{caller}".encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest()) < canary.share * 2**64


@dataclass
class Counts:
    """Of one version, as one or all replicas have seen it."""

    requests: int = 0
    errors: int = 0
    """Of these, answered by the champion instead."""
    compared: int = 0
    """With what the champion says to the same rows."""
    agreed: int = 0
    dropped: int = 0
    """Copies that were not compared, because the replica had no time."""
    latencies: dict[int, int] = field(default_factory=dict)
    """Bucket -> requests."""

    def answered(self, seconds: float) -> None:
        self.requests += 1
        at = max(0, math.ceil(math.log(max(seconds, LEAST_S) / LEAST_S, STEP)))
        self.latencies[at] = self.latencies.get(at, 0) + 1

    @property
    def p99_s(self) -> float:
        """Upper end of the bucket that holds it; 0 without requests."""
        total, seen = sum(self.latencies.values()), 0
        for at in sorted(self.latencies):
            seen += self.latencies[at]
            if seen >= 0.99 * total:
                return float(LEAST_S * STEP**at)
        return 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Counts:
        latencies = {int(at): n for at, n in value["latencies"].items()}
        return Counts(**{**value, "latencies": latencies})

    def summary(self) -> dict[str, Any]:
        """For a person."""
        shown: dict[str, Any] = {"requests": self.requests, "errors": self.errors}
        if self.latencies:
            shown["p99_ms"] = round(self.p99_s * 1000, 2)
        if self.compared:
            shown["compared"] = self.compared
            shown["agreement"] = round(self.agreed / self.compared, 4)
        if self.dropped:
            shown["dropped"] = self.dropped
        return shown


Tally = dict[int, Counts]
"""Version -> what was counted of it."""


def add(tallies: Iterable[Tally]) -> Tally:
    """Their sum."""
    total: Tally = {}
    for tally in tallies:
        for version, counts in tally.items():
            into = total.setdefault(version, Counts())
            for name in ("requests", "errors", "compared", "agreed", "dropped"):
                setattr(into, name, getattr(into, name) + getattr(counts, name))
            for at, n in counts.latencies.items():
                into.latencies[at] = into.latencies.get(at, 0) + n
    return total


@dataclass(frozen=True)
class Decision:
    what: Literal["wait", "promote", "rollback", "end"]
    reason: str


def decide(
    canary: Canary,
    tally: Tally,
    champion: int,
    now_s: float,
    refused: str = "",
    drifts: Mapping[str, Drift] | None = None,
) -> Decision:
    """What becomes of a canary.

    Args:
        champion: the version that is champion now.
        refused: why a replica cannot answer with the version, or "".
        drifts: column -> how far requests are from what the version was trained on.
    """
    rule = canary.rule
    ours = tally.get(canary.version, Counts())
    theirs = tally.get(canary.instead_of, Counts())
    if champion == canary.version:
        return Decision("end", "it was promoted otherwise")
    if champion != canary.instead_of:
        return Decision("end", f"the champion is version {champion} now, not {canary.instead_of}")
    if refused:
        return Decision("rollback", f"it cannot be served: {refused}")
    left_s = canary.started_s + canary.minutes * 60 - now_s
    enough = ours.requests >= rule.requests
    at_end = left_s <= 0 and enough
    differing = ours.compared - ours.agreed
    broken = _over("errors", ours.errors, ours.requests, rule.errors, at_end) or _over(
        "disagreement", differing, ours.compared, rule.disagreement, at_end
    )
    if not broken and enough and theirs.requests >= rule.requests:
        ratio = ours.p99_s / theirs.p99_s
        if ratio > rule.p99_ratio:
            said = f"p99 {ours.p99_s * 1000:.1f} ms is {ratio:.2f} times the champion's"
            broken = f"{said}, at most {rule.p99_ratio:g} is accepted"
    if not broken and rule.drift is not None:
        for column, drift in (drifts or {}).items():
            if drift.psi > rule.drift:
                said = f"drift {drift.psi:.2f} of {column} from its training data"
                broken = f"{said}, at most {rule.drift:g} is accepted"
                break
    if broken:
        return Decision("rollback", broken)
    if left_s > 0:
        return Decision("wait", f"{left_s / 60:.1f} of {canary.minutes:g} minutes are left")
    if not enough:
        said = f"its time is over, but it had {ours.requests} of {rule.requests} requests"
        return Decision("wait", said)
    return Decision(
        "promote", f"{canary.minutes:g} minutes and {ours.requests} requests without a broken rule"
    )


def _over(name: str, some: int, of: int, limit: float, at_end: bool) -> str:
    """What is wrong with a share, or "": before the end it must be certain."""
    if of == 0 or some / of <= limit:
        return ""
    if not at_end and (some < FEWEST or _least(some, of) <= limit):
        return ""
    return f"{name} {some / of:.1%} ({some} of {of}), at most {limit:.1%} is accepted"


def _least(some: int, of: int) -> float:
    """Lower end of Wilson's interval for a share."""
    z2 = CERTAIN**2
    share = some / of
    middle = share + z2 / (2 * of)
    spread = CERTAIN * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return (middle - spread) / (1 + z2 / of)
