"""The gate decides from numbers alone."""

from __future__ import annotations

import pytest

from lepton_ray.config.schema import Gate
from lepton_ray.tracking.gate import decide


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
