"""The one way to run Ray: the cluster that is named, else an embedded one that is torn down."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.node import Node
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.config.schema import Serve, Workers
from lepton_ray.errors import ClusterError
from lepton_ray.jobs import cluster_file, proxy
from lepton_ray.priority import RAY, look_after
from lepton_ray.training import processor
from lepton_ray.training.elasticity import NO_DASHBOARD, SPOT

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
PROBE_S = 60  # for a process to start on every node
# What replicas and trials load, in the processes that Ray starts before they are asked for: one for
# each processor, and ten take a gigabyte.
PRELOAD = {"RAY_preload_python_modules": "torch,ray.train,ray.tune"}
PRELOAD_UP_TO = 16  # processors
# Nobody reads the counts of a Ray that ends with its command, and every process of it sends them.
UNCOUNTED = {"RAY_enable_metrics_collection": "0"}
NOT_STARTED = ("start_monitor", "start_log_monitor", "start_api_server")
AGENT = "ray::DashboardAgent"  # tells of the node; no task and no request waits for it

_started_here = False  # whether the Ray of this process is the embedded one


@contextlib.contextmanager
def session(address: str | None = None, *, trains: bool = False) -> Iterator[None]:
    """Ray for the time of the block.

    A Ray that this process has already initialised is used and left alone; ``address`` or
    RAY_ADDRESS is connected to; else a cluster is started here and stopped at the end, also on
    an error or Ctrl-C.

    Args:
        trains: what is started here prepares processes for replicas and trials.

    Raises:
        ClusterError: when the address cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _reach(address)
    global _started_here
    on_terminate = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    with contextlib.ExitStack() as held:
        folder = None
        if not address:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="lepton-")))
            options |= {"num_cpus": os.cpu_count(), "include_dashboard": False}
        _init(address, folder, held, options, trains=trains)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would end the process untidily
        _started_here = not address
        try:
            yield
        finally:
            _started_here = False
            ray.shutdown()


@contextlib.contextmanager
def session_beside(module: str, address: str | None = None) -> Iterator[None]:
    """A `session` to train in, while a module is imported: starting Ray is waiting, torch takes a
    processor.

    An error of the import is left to whoever imports it next.
    """

    def load() -> None:
        with contextlib.suppress(Exception):
            importlib.import_module(module)

    loading = threading.Thread(target=load, name=f"import {module}")
    loading.start()
    with session(address, trains=True):
        loading.join()
        yield


def _init(
    address: str | None,
    files: Path | None,
    held: contextlib.ExitStack,
    options: dict[str, Any],
    *,
    trains: bool,
) -> None:
    """
    Args:
        files: folder for an embedded cluster's proxy.
        held: gets what is this cluster's own until it ends.
    """
    try:
        if files is None:
            ray.init(address=address, **options)
            return
        processors = os.cpu_count() or 1
        settings = RAY | UNCOUNTED
        if trains and processors <= PRELOAD_UP_TO:
            settings |= PRELOAD
        if proxy.available():
            ports = held.enter_context(proxy.own_ports(proxy.ports_needed()))
            settings |= proxy.settings(files, ports, processors)
        with proxy.environment(settings), alone():
            ray.init(address="local", **options)
        for agent in _agents():
            look_after(agent)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {error}; leave --address and RAY_ADDRESS out to use "
            "an embedded one"
        ) from error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Start Ray without what only a cluster that others look at needs: the autoscaler's monitor,
    the one that sends logs to drivers, and the server of the dashboard, which without it only
    counts Ray's users. They took a sixth of the processors' time until a session was there.

    These are private names of Ray 2.60, which is pinned; a test fails when they go away.
    """
    kept = {name: getattr(Node, name) for name in NOT_STARTED}
    for name in NOT_STARTED:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
        _internal_kv_put(DASHBOARD_ADDRESS, NO_DASHBOARD, namespace=KV_NAMESPACE_DASHBOARD)
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _agents() -> list[int]:
    """Processes that tell of the node, of the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if AGENT in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def _reach(address: str) -> None:
    """Something listens at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like: Ray knows where
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {error}; leave --address and RAY_ADDRESS out to use "
            "an embedded one"
        ) from error


def is_embedded(address: str | None = None) -> bool:
    """Whether `session` would start a cluster of its own, or has."""
    return _started_here or not (ray.is_initialized() or address or os.environ.get("RAY_ADDRESS"))


def resources() -> dict[str, float]:
    """What the cluster has in all, and as ``spot CPU`` and so on what of it is on spot nodes."""
    total: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            total.update(node["Resources"])
            if SPOT.items() <= node["Labels"].items():
                total.update({f"spot {name}": n for name, n in node["Resources"].items()})
    return dict(total)


def possible(present: Mapping[str, float]) -> dict[str, float]:
    """What the cluster has or may start, as `resources` gives it.

    The head of a cluster of `cluster/` names its file in LEPTON_CLUSTER_FILE. Where Ray alone knows
    what a machine has, there is no limit.
    """
    path = os.environ.get("LEPTON_CLUSTER_FILE")
    if not path:
        return dict(present)
    most: Counter[str] = Counter()
    for kind in cluster_file.read(path).workers:
        has = {"CPU": kind.cpus, "GPU": kind.gpus}
        for name, each in has.items():
            amount = float("inf") if each is None else kind.maximum * each
            most.update({name: amount, **({f"spot {name}": amount} if kind.spot else {})})
    return {name: max(present.get(name, 0.0), most[name]) for name in {*present, *most}}


def processors() -> dict[str, list[str]]:
    """Addresses of the cluster's nodes by `processor.kind`; of those that answer."""
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(num_cpus=0)(processor.kind).options(scheduling_strategy=there)
            asked[probe.remote()] = node["NodeManagerAddress"]
    found: dict[str, list[str]] = {}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
    for answer in answered:
        with contextlib.suppress(RayError):  # a node that cannot is told of when it trains
            found.setdefault(ray.get(answer), []).append(asked[answer])
    return found


def check_alike(kinds: Mapping[str, Sequence[str]], where: str) -> None:
    """Replicas on any of the nodes compute the same bytes.

    Args:
        kinds: as `processors` gives them.

    Raises:
        ClusterError: naming the kinds and their nodes.
    """
    if len(kinds) < 2:
        return
    common = set.intersection(*(set(kind.split()) for kind in kinds))
    named = [
        f"{' '.join(w for w in kind.split() if w not in common) or 'without those'} at "
        f"{', '.join(nodes)}"
        for kind, nodes in kinds.items()
    ]
    raise ClusterError(
        f"{where} has processors that compute unlike each other ({'; '.join(named)}), so that "
        "training could not be exact: use one kind of machine, or set train.exact: false"
    )


def check_room(workers: Workers, available: Mapping[str, float], where: str) -> None:
    """The cluster has room for ``workers.min``.

    Args:
        available: as `resources` gives it.

    Raises:
        ClusterError: naming what is missing, instead of waiting for it.
    """
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        needed, present = workers.min * each, available.get(name, 0.0)
        if workers.spot:
            present -= available.get(f"spot {name}", 0.0)
        if needed > present:
            apart = " on nodes that are not spot" if workers.spot else ""
            raise ClusterError(
                f"workers.min={workers.min} with {each:g} {name} each needs {needed:g} {name}, "
                f"{where} has {present:g}{apart}: {needed - present:g} {name} are missing; lower "
                f"workers.min or workers.{name.lower()}s, or name a larger cluster with --address"
            )


def check_gpus(serve: Serve, available: Mapping[str, float]) -> None:
    """The cluster has the GPUs of an endpoint's first replicas.

    Args:
        available: as `possible` gives it.

    Raises:
        ClusterError: instead of waiting for them.
    """
    needed, present = max(1, serve.replicas.min) * serve.gpus, available.get("GPU", 0.0)
    if needed > present:
        raise ClusterError(
            f"serve.gpus={serve.gpus:g} needs {needed:g} GPU for the first replicas, the cluster "
            f"has {present:g}: lower it or serve.replicas.min, set --set serve.gpus=0 to answer on "
            "CPUs, or name another cluster with --address"
        )
