"""The gate decides from numbers alone."""

from __future__ import annotations

import pytest

from lepton_ray.config.schema import Gate
from lepton_ray.tracking.gate import Served, asks_for_serving, decide


@pytest.mark.parametrize(
    ("gate", "value", "rivals", "direction", "passed"),
    [
        ({"at_least": 0.9}, 0.9, {}, "max", [True]),
        ({"at_least": 0.9}, 0.89, {}, "max", [False]),
        ({"metric": "loss", "at_most": 0.5}, 0.4, {}, "min", [True]),
        ({"beats": ["baseline"]}, 0.5, {"baseline": 0.5}, "max", [False]),
        ({"beats": ["champion"]}, 0.5, {"champion": 0.5}, "max", [True]),
        ({"beats": ["champion"]}, 0.5, {}, "max", [True]),
        ({"metric": "loss", "beats": ["linear"]}, 0.3, {"linear": 0.2}, "min", [False]),
        (
            {"at_least": 0.9, "beats": ["baseline", "linear"]},
            0.92,
            {"baseline": 0.1, "linear": 0.95},
            "max",
            [True, True, False],
        ),
    ],
)
def test_rules(gate: dict, value: float, rivals: dict, direction: str, passed: list[bool]) -> None:
    settings = Gate(**{"beats": (), **gate})
    assert [c.passed for c in decide(settings, value, rivals, direction)] == passed


def test_a_miss_says_by_how_much() -> None:
    (check,) = decide(Gate(at_least=0.9, beats=()), 0.85, {}, "max")
    assert check.missed_by == pytest.approx(0.05)


def test_latency_size_and_parity_are_rules_too() -> None:
    served = Served(latency_ms=2.5, mb=1.5, difference=2e-7)
    none = Gate(beats=[])
    assert not asks_for_serving(none)
    assert decide(none, 0.9, {}, "max", served) == []
    gate = Gate(beats=[], max_latency_ms=2, max_mb=1.5, max_difference=1e-6)
    assert asks_for_serving(gate)
    latency, size, parity = decide(gate, 0.9, {}, "max", served)
    assert (latency.rule, latency.passed) == ("latency_ms 2.5 <= 2", False)
    assert latency.missed_by == pytest.approx(0.5)
    assert (size.rule, size.passed) == ("mb 1.5 <= 1.5", True)
    assert (parity.rule, parity.passed) == ("difference 2e-07 <= 1e-06", True)
