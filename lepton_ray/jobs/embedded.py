"""A Ray of this process alone: started for a command on this machine, and ended with it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.node import Node
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
from ray._raylet import (  # type: ignore[attr-defined]  # a compiled module
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)
from ray.experimental.internal_kv import _internal_kv_put

from lepton_ray.errors import ClusterError
from lepton_ray.jobs import proxy
from lepton_ray.priority import RAY, look_after
from lepton_ray.training.elasticity import NO_DASHBOARD

# What replicas and trials load, in the processes that Ray starts before they are asked for: one for
# each processor, and ten take a gigabyte.
PRELOAD = {"RAY_preload_python_modules": "torch,ray.train,ray.tune"}
PRELOAD_UP_TO = 16  # processors
# Nobody reads the counts of a Ray that ends with its command, and every process of it sends them.
UNCOUNTED = {"RAY_enable_metrics_collection": "0"}
# For the process that prepares environments, where a task wants one; Ray: 30 s.
PATIENT = {"RAY_agent_register_timeout_ms": "300000"}
NOT_STARTED = ("start_monitor", "start_log_monitor", "start_api_server")
# Tells of the node; no task and no request waits for it. Its names while it loads and after.
AGENT = ("dashboard/agent.py", "ray::DashboardAgent")
AGENT_PORTS = (
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)


def start(held: contextlib.ExitStack, options: dict[str, Any], *, trains: bool) -> None:
    """Start it, on all processors, with a proxy for endpoints where this machine has one.

    Args:
        held: gets the files and ports that are its own; to be closed when it has ended.
        options: of ``ray.init``.
        trains: it prepares processes for replicas and trials.

    Raises:
        ClusterError: when it does not start.
    """
    processors = os.cpu_count() or 1
    settings = RAY | UNCOUNTED | PATIENT
    if trains and processors <= PRELOAD_UP_TO:
        settings |= PRELOAD
    folder = held.enter_context(tempfile.TemporaryDirectory(prefix="lepton-"))
    try:
        ports = held.enter_context(proxy.own_ports(len(AGENT_PORTS) + proxy.ports_needed()))
        if proxy.available():
            settings |= proxy.settings(Path(folder), ports + len(AGENT_PORTS), processors)
        with proxy.environment(settings), alone(ports):
            ray.init(address="local", num_cpus=processors, include_dashboard=False, **options)
    except Exception as error:  # Ray raises just that for a raylet that ended
        logs = Path(get_default_ray_temp_dir(), "session_latest", "logs")
        raise ClusterError(
            f"no Ray could be started on this machine: {str(error).rstrip('.')}; its log is in "
            f"{logs}; name a cluster with --address to use that"
        ) from error
    for agent in _agents():
        look_after(agent)


@contextlib.contextmanager
def alone(first_port: int) -> Iterator[None]:
    """Start Ray without what only a cluster that others look at needs: the autoscaler's monitor,
    the one that sends logs to drivers, and the server of the dashboard, which without it only
    counts Ray's users. They took a sixth of the processors' time until a session was there.

    And without waiting for the processes that tell of the node. A raylet waits 15 s, which cannot
    be set, for the files in which they say their ports, and ends; on a busy machine they take
    longer than that to load.

    These are private names of Ray 2.60, which is pinned; a test fails when they go away.

    Args:
        first_port: of as many as AGENT_PORTS names, which are free.
    """

    def nothing(node: Node, **options: Any) -> None:
        pass

    def start_raylet(node: Node, *arguments: Any, **options: Any) -> None:
        for port, name in enumerate(AGENT_PORTS, first_port):
            setattr(node._ray_params, name, port)
            persist_port(node._session_dir, node._node_id, name, port)
        theirs["start_raylet"](node, *arguments, **options)

    ours = {**dict.fromkeys(NOT_STARTED, nothing), "start_raylet": start_raylet}
    theirs = {name: getattr(Node, name) for name in ours}
    for name, method in ours.items():
        setattr(Node, name, method)
    try:
        yield
        _internal_kv_put(DASHBOARD_ADDRESS, NO_DASHBOARD, namespace=KV_NAMESPACE_DASHBOARD)
    finally:
        for name, method in theirs.items():
            setattr(Node, name, method)


def _agents() -> list[int]:
    """Processes that tell of the node, of the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(AGENT) for word in process.cmdline()):
                found.append(process.pid)
    return found
