"""Which ports the Serve of this machine's Ray has opened beside the endpoint's, and to whom."""

from __future__ import annotations

import ipaddress
import os

import psutil

from lepton_ray.tracking.endpoints import Port

# Serve's own settings and what they are without one, see `jobs.proxy`.
_SINGLE = {
    "HAProxy's statistics": ("RAY_SERVE_HAPROXY_STATS_PORT", 8404),
    "HAProxy's counts": ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101),
    "Serve's own proxy": ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", 8500),
}
_REPLICAS = (
    ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", 30_000),
    ("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", 31_000),
)


def opened() -> tuple[Port, ...]:
    """Those that something listens at; none where no HAProxy is in front, for then there are none.

    Serve has settings for their numbers, but none for the address that they listen at.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return ()
    names = {_setting(*setting): name for name, setting in _SINGLE.items()}
    first, last = (_setting(*setting) for setting in _REPLICAS)
    listening: dict[int, bool] = {}
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN and socket.laddr:
            local = ipaddress.ip_address(socket.laddr.ip).is_loopback
            listening[socket.laddr.port] = listening.get(socket.laddr.port, True) and local
    found = []
    for number, local in sorted(listening.items()):
        name = names.get(number) or ("a replica" if first <= number <= last else "")
        if name:
            found.append(Port(number, name, local))
    return tuple(found)


def _setting(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
