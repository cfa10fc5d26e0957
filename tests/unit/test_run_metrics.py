"""The numbers of a run for Prometheus, and the files that show them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lepton_ray.jobs.metrics import COUNTERS, GAUGES, Progress

OBSERVABILITY = Path(__file__).parents[2] / "cluster" / "observability"


def seen(*events: dict) -> Progress:
    progress = Progress()
    for event in events:
        progress.see(event)
    return progress


def test_a_loss_costs_what_it_cost() -> None:
    """10 steps, then two lost and done again, and 5 s of standing still, in 20 s."""
    done = seen(
        {"kind": "start", "at": 100.0, "replicas": 3, "step": 0},
        {"kind": "first_step", "at": 100.5, "step": 1, "stood_still_s": None},
        {"kind": "progress", "at": 110.0, "step": 10, "steps": 100, "steps_per_s": 2.0},
        {"kind": "resize", "at": 110.5, "reason": "replica x is lost"},
        {"kind": "start", "at": 115.0, "replicas": 2, "step": 8},
        {"kind": "first_step", "at": 115.5, "step": 9, "stood_still_s": 5.0},
        {"kind": "progress", "at": 120.0, "step": 18, "steps": 100, "steps_per_s": 2.0},
    )
    assert (done.resizes, done.losses, done.redone, done.replicas) == (1, 1, 2, 2)
    assert done.goodput == pytest.approx(1 - (5 + 2 / 2) / 20)


def test_an_undisturbed_run_loses_nothing() -> None:
    done = seen(
        {"kind": "start", "at": 0.5, "replicas": 2, "step": 0},
        {"kind": "first_step", "at": 1.0, "step": 1, "stood_still_s": None},
        {"kind": "progress", "at": 9.0, "step": 50, "steps": 50, "steps_per_s": 6.0},
    )
    assert (done.resizes, done.redone, done.goodput) == (0, 0, 1.0)


def test_the_dashboard_and_the_alerts_ask_for_what_there_is() -> None:
    dashboard = json.loads((OBSERVABILITY / "grafana.json").read_text())
    alerts = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    named = set(re.findall(r"ray_lepton_\w+", " ".join(asked)))
    shown = {f"ray_{n}" for n in GAUGES} | {f"ray_{n}_total" for n in COUNTERS}
    assert named == shown, "each is shown, and no other is asked for"
