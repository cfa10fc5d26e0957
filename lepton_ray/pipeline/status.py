"""What runs and has run here, and why something does not."""

from __future__ import annotations

from typing import Any

from lepton_ray.jobs import facts
from lepton_ray.jobs.diagnosis import diagnose
from lepton_ray.jobs.submission import resolve
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import store

RUNS = 20  # shown, the newest


def runs(name: str | None, terminal: Terminal) -> list[dict[str, Any]]:
    """Trainings and studies in MLflow, the newest first.

    Args:
        name: of an experiment; all of them by default.
    """
    found = [_run(run) for run in store.top_level_runs(name, RUNS)]
    for run in found:
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in sorted(run["metrics"].items())[:3])
        terminal.say(f"{run['experiment']:20} {run['name']:28} {run['status']:9} {metrics}")
    if not found:
        terminal.say("no runs yet")
    return found


def _run(run: Any) -> dict[str, Any]:
    shown = ("val_loss", "val_accuracy", "val_rmse")
    return {
        "experiment": run.data.tags.get("lepton_ray.experiment", ""),
        "name": run.info.run_name,
        "status": run.info.status,
        "id": run.info.run_id,
        "started": run.info.start_time / 1000,
        "metrics": {k: v for k, v in run.data.metrics.items() if k in shown},
    }


def why(
    address: str | None, job: str | None, cluster: str | None, terminal: Terminal
) -> list[dict[str, Any]]:
    """What keeps a cluster, or one job on it, from running, each with what to do.

    Raises:
        InputError: when there is no such job, or no address.
    """
    seen = facts.collect(resolve(address), job, cluster)
    findings = diagnose(seen)
    for finding in findings:
        terminal.say(f"{finding.what}\n  -> {finding.do}")
        for line in finding.lines:
            terminal.say(f"     | {line}")
    if not findings:
        terminal.say("nothing is wrong that can be seen from here")
    return [finding.to_json() for finding in findings]
