"""What runs now, and why something does not."""

from __future__ import annotations

import argparse
from typing import Any

from lepton_ray.cli.commands import Commands
from lepton_ray.cli.terminal import Terminal


def declare(commands: Commands) -> None:
    """Add status."""
    status = commands.add("status", _status, "what runs now; with --why, why something does not")
    status.add_argument("name", nargs="?", metavar="NAME", help="of an experiment, or a job")
    status.add_argument("--why", action="store_true", help="ask the cluster what is wrong")
    status.add_argument("--address", help="--why: of the dashboard; default RAY_ADDRESS")
    status.add_argument("--cluster", metavar="YAML", help="--why: the file of the cluster")


def _status(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.pipeline import status

    if options.why:
        found = status.why(options.address, options.name, options.cluster, terminal)
        return {"findings": found}
    return {"runs": status.runs(options.name, terminal)}
