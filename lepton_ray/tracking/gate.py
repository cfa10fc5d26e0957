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


def decide(
    gate: Gate, value: float, rivals: Mapping[str, float | None], direction: str
) -> list[Check]:
    """One check for each rule of the gate; the version is promoted when all passed.

    Args:
        value: the version's metric on the test split.
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
    return checks


def _check(rule: str, margin: float, equal_passes: bool) -> Check:
    passed = margin > 0 or (equal_passes and margin == 0)
    return Check(rule=rule, passed=passed, missed_by=0.0 if passed else -margin)
