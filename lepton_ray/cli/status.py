"""What runs now."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from lepton_ray.cli.commands import Commands
from lepton_ray.cli.terminal import Terminal
from lepton_ray.errors import ModelError


def declare(commands: Commands) -> None:
    """Add status."""
    status = commands.add("status", _status, "what runs now; with --why, why something does not")
    status.add_argument(
        "name", nargs="?", metavar="NAME", help="of a model or an experiment; with --why, of a job"
    )
    status.add_argument("--why", action="store_true", help="ask the cluster what is wrong")
    status.add_argument("--address", help="--why: of the dashboard; default RAY_ADDRESS")
    status.add_argument("--cluster", metavar="YAML", help="--why: the file of the cluster")


def _status(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import status

    if options.why:
        found = status.why(options.address, options.name, options.cluster, terminal)
        return {"findings": found}
    runs, studies = status.runs(options.name, terminal), _studies(options.name, terminal)
    try:
        endpoints = _endpoints(options.name, terminal)
    except ModelError:  # an experiment has a name before it has a model
        if not runs and not studies:
            raise
        endpoints = {}
    return {"runs": runs, "studies": studies, "endpoints": endpoints}


def _studies(name: str | None, terminal: Terminal) -> dict[str, Any]:
    """Of each experiment, its last study."""
    from lepton_ray.jobs.studies import overview

    said: dict[str, Any] = {}
    for experiment, (folder, lines, state) in overview(name).items():
        terminal.say(f"{experiment}")
        terminal.say(f"  study     {folder}, {state['stands']}")
        terminal.say("\n".join(f"  {line}" for line in lines))
        said[experiment] = {"folder": folder, **state}
    return said


def _endpoints(name: str | None, terminal: Terminal) -> dict[str, Any]:
    """Of each model: what runs, what is tried, and what became of the last canary."""
    from lepton_ray.data.drift import NOTICEABLE
    from lepton_ray.tracking import endpoints
    from lepton_ray.tracking.canary import add

    said: dict[str, Any] = {}
    for model, (tried, reports) in endpoints.overview(name).items():
        now_s = time.time()
        terminal.say(f"{model}")
        for report in reports:
            ago_s = now_s - report.seen_s
            state = "" if ago_s < endpoints.SILENT_S else f"silent for {ago_s:.0f} s; "
            terminal.say(
                f"  endpoint  {report.url}: {state}{report.reference} is version {report.version}, "
                f"{report.replicas} replica{'s' * (report.replicas != 1)}"
            )
            if report.problem:
                terminal.say(f"            {report.problem}")
            for port in report.ports:
                where = "loopback only" if port.local else "all addresses of its machine"
                terminal.say(f"            port {port.number}: {port.what}, on {where}")
            for version, columns in report.drifts.items():
                for column, drift in columns.items():
                    if drift.psi >= NOTICEABLE:
                        terminal.say(
                            f"            drift {drift.psi:.2f} of {column} from the training data "
                            f"of version {version}: {drift.unseen:.1%} of {drift.rows:,} rows are "
                            "unlike any there"
                        )
        if not reports:
            terminal.say("  endpoint  none")
        canary = tried.canary
        if canary is not None:
            terminal.say(
                f"  canary    version {canary.version} on {canary.share:.0%} of callers, "
                f"instead of {canary.instead_of}"
            )
            for report in reports:
                if report.canary == canary.id and report.decision:
                    terminal.say(f"            {report.decision}")
        if tried.shadow is not None:
            terminal.say(f"  shadow    version {tried.shadow}")
        attempt = canary.id if canary else ""
        tally = add(r.tally for r in reports if r.canary == attempt)
        for version, counts in sorted(tally.items()):
            shown = ", ".join(f"{key} {value}" for key, value in counts.summary().items())
            terminal.say(f"            version {version}: {shown}")
        if tried.last is not None:
            last = tried.last
            terminal.say(
                f"  last      version {last['version']} {last['outcome']}: {last['reason']}"
            )
        said[model] = {
            "endpoints": [
                {
                    "url": r.url,
                    "reference": r.reference,
                    "version": r.version,
                    "replicas": r.replicas,
                    "seconds_since_heard": round(now_s - r.seen_s, 1),
                    "decision": r.decision,
                    "problem": r.problem,
                    "ports": [asdict(port) for port in r.ports],
                    "drift": {
                        str(version): {column: asdict(drift) for column, drift in columns.items()}
                        for version, columns in r.drifts.items()
                    },
                }
                for r in reports
            ],
            "canary": canary.to_json() if canary else None,
            "shadow": tried.shadow,
            "versions": {str(v): c.summary() for v, c in sorted(tally.items())},
            "last": tried.last,
        }
    if not said:
        terminal.say("no endpoints")
    return said
