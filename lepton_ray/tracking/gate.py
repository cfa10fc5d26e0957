"""What a version must beat to be promoted: a pure decision over measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lepton_ray.config.schema import Gate


@dataclass(frozen=True, kw_only=True)
class Check:
    rule: str
    """What had to hold, such as ``accuracy >= 0.95``."""
    passed: bool
    missed_by: float
    """How far it was from holding; 0 when it held."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What serving a version takes, beside its answers."""

    latency_ms: float
    """Median of the runtime for one row."""
    mb: float
    """Of the model's file."""
    difference: float
    """Largest between the answers of torch and of the runtime."""


def decide(
    gate: Gate,
    value: float,
    rivals: Mapping[str, float | None],
    direction: str,
    served: Served | None = None,
) -> list[Check]:
    """One check for each rule of the gate; the version is promoted when all passed.

    Args:
        value: the version's metric on the test split.
        served: measured, where the gate `asks_for_serving`.
        rivals: name -> the same metric of a rival on the same data; None when there is none (no
            champion yet), which passes.
        direction: ``max`` when more is better, ``min`` when less is.
    """
    checks = []
    if gate.at_least is not None:
        checks.append(_check(f"{gate.metric} >= {gate.at_least:g}", value - gate.at_least, True))
    if gate.at_most is not None:
        checks.append(_check(f"{gate.metric} <= {gate.at_most:g}", gate.at_most - value, True))
    for name in gate.beats:
        rival = rivals.get(name)
        if rival is None:
            checks.append(
                Check(rule=f"better than {name} (there is none)", passed=True, missed_by=0)
            )
            continue
        margin = value - rival if direction == "max" else rival - value
        # A version as good as the champion replaces it: equal data and code give equal bytes.
        rule = (
            f"{'at least as good as' if name == 'champion' else 'better than'} {name} {rival:.4f}"
        )
        checks.append(_check(rule, margin, name == "champion"))
    if served is not None:
        for what, most, measured in (
            ("latency_ms", gate.max_latency_ms, served.latency_ms),
            ("mb", gate.max_mb, served.mb),
            ("difference", gate.max_difference, served.difference),
        ):
            if most is not None:
                checks.append(_check(f"{what} {measured:.3g} <= {most:g}", most - measured, True))
    return checks


def asks_for_serving(gate: Gate) -> bool:
    """Whether a rule needs `Served`."""
    return any(v is not None for v in (gate.max_latency_ms, gate.max_mb, gate.max_difference))


def _check(rule: str, margin: float, equal_passes: bool) -> Check:
    passed = margin > 0 or (equal_passes and margin == 0)
    return Check(rule=rule, passed=passed, missed_by=0.0 if passed else -margin)
