"""Collects the facts of `diagnosis` from a cluster's job server."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lepton_ray.errors import ClusterError, StoreError
from lepton_ray.jobs import cluster_file
from lepton_ray.jobs.diagnosis import Demand, Facts, Node
from lepton_ray.jobs.server import Server
from lepton_ray.tracking import store

LOG_LINES = 400


def collect(address: str, job: str | None = None, file: str | Path | None = None) -> Facts:
    """All that can be seen from here.

    Args:
        job: its name, where one is meant.
        file: the cluster file.

    Raises:
        InputError: when there is no such job, or the file cannot be read.
    """
    given = cluster_file.read(file) if file is not None else None
    try:
        server = Server(address)
    except ClusterError as error:
        return Facts(unreachable=str(error), file=given)
    log, nodes = "", server.nodes()
    for node in nodes:
        if node["raylet"].get("isHeadNode"):
            for name in ("monitor.log", "monitor.out", "monitor.err"):
                log += server.node_log(node["raylet"]["nodeId"], name, LOG_LINES)
    facts = replace(
        parse_status(server.status_text(), log, time.time()),
        nodes=parse_nodes(nodes),
        file=given,
    )
    if job is not None:
        found = server.job(job)
        facts = replace(
            facts,
            job=found.id,
            job_status=found.status,
            job_message=found.message,
            job_log=server.logs(job),
        )
    try:
        store.client()
    except StoreError as error:
        facts = replace(facts, tracking_error=str(error))
    return facts


def parse_nodes(answer: list[dict[str, Any]]) -> tuple[Node, ...]:
    """Of the dashboard's ``/nodes?view=summary``."""
    found = []
    for entry in answer:
        raylet = entry["raylet"]
        found.append(
            Node(
                address=str(raylet.get("nodeManagerAddress") or entry.get("ip") or ""),
                alive=raylet.get("state") == "ALIVE",
                head=bool(raylet.get("isHeadNode")),
                resources=raylet.get("resourcesTotal") or {},
                draining=bool(raylet.get("isDraining")),
                why_dead=str(raylet.get("stateMessage") or ""),
            )
        )
    return tuple(found)


HEADS = ("Active:", "Idle:", "Pending:", "Recent failures:", "Pending Demands:", "Demands:")
DEMAND = re.compile(r"^(\{.*?\})(?:\s*\*\s*(\d+))?.*?:\s*(\d+)\+")
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", re.M)
READ_ONLY = "use read only node provider"  # Ray's monitor on a cluster that starts no machines
CRASH = "Traceback (most recent call last)"


def parse_status(answer: dict[str, Any], log: str, now: float) -> Facts:
    """Of what `Server.status_text` gives, and of the autoscaler's log.

    Ray's second autoscaler writes no time of its own, so its log says when it last did something.

    Args:
        now: in seconds since 1970, on a machine in the head's time zone.
    """
    sections: dict[str, list[str]] = {}
    current = ""
    for line in answer["text"].splitlines():
        if line.strip() in HEADS:
            current = line.strip().removeprefix("Pending ") if "Demands" in line else line.strip()
        elif not line.startswith(" ") and line.strip():
            current = ""
        elif current and line.strip() and "(no " not in line:
            sections.setdefault(current, []).append(line.strip())
    stamps = STAMP.findall(log)
    written = answer["time"]
    if written is None and stamps:
        written = time.mktime(time.strptime(max(stamps), "%Y-%m-%d %H:%M:%S"))
    scales = bool(log) and READ_ONLY not in log
    error = answer["error"]
    if not error and CRASH in log[-4000:]:
        error = log[log.rindex(CRASH) :]
    return Facts(
        demands=tuple(_demands(sections.get("Demands:", []))),
        pending_nodes=tuple(sections.get("Pending:", [])),
        failed_nodes=tuple(sections.get("Recent failures:", [])),
        autoscaler_error=error,
        autoscaler_age_s=max(0.0, now - written) if scales and written else None,
        autoscaler_reports=answer["time"] is not None,
        autoscaler_log=log,
    )


def _demands(lines: list[str]) -> Iterator[Demand]:
    for line in lines:
        found = DEMAND.match(line)
        if not found:
            continue
        try:
            resources = ast.literal_eval(found[1])
        except (ValueError, SyntaxError):
            continue
        named = {k: v for k, v in resources.items() if isinstance(v, int | float)}
        yield Demand(resources=named, count=int(found[2] or 1) * int(found[3]))
