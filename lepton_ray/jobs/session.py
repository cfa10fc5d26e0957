"""The one way to run Ray: the cluster that is named, else an embedded one that is torn down."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.config.schema import Serve, Workers
from lepton_ray.errors import ClusterError
from lepton_ray.jobs import cluster_file, embedded
from lepton_ray.training import processor
from lepton_ray.training.elasticity import SPOT

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
PROBE_S = 60  # for a process to start on every node
NOT_REACHED = (
    "no Ray cluster at {!r}: {}; leave --address and RAY_ADDRESS out to use an embedded one"
)

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
        if address:
            _connect(address, options)
        else:
            embedded.start(held, options, trains=trains)
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


def _connect(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(NOT_REACHED.format(address, error)) from error


def _reach(address: str) -> None:
    """Something listens at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like: Ray knows where
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(NOT_REACHED.format(address, error)) from error


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
