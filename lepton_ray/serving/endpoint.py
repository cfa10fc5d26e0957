"""Start, query and stop an endpoint on the Ray that this process is connected to."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from lepton_ray.config.schema import Serve
from lepton_ray.errors import EndpointError, ServingError
from lepton_ray.serving import follower
from lepton_ray.serving.app import application
from lepton_ray.tracking import registry

QUERY_TIMEOUT_S = 60


@dataclass(frozen=True)
class Live:
    url: str

    def keep(self, say: Callable[[str], None]) -> None:
        """Until Ctrl-C."""
        say("keep   serving; stop with Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def check_port(host: str, port: int) -> None:
    """The port is free.

    Raises:
        ServingError: when something else listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"port {port} on {host} cannot be used: {error.strerror}; choose another with "
                f"--set serve.port={port + 1 if port < 65535 else port - 1}"
            ) from error


@contextlib.contextmanager
def serving(reference: str, config: Serve) -> Iterator[Live]:
    """What a reference names, over HTTP, for the time of the block; an alias is followed.

    Raises:
        ServingError: when the port is taken.
        EndpointError: when the application does not become healthy.
    """
    if not serve.status().proxies:  # else the port is taken by the Serve that will answer
        check_port(config.host, config.port)
    version = registry.resolve(reference)
    folder = version.folder()
    serve.start(http_options={"host": config.host, "port": config.port})
    connected = serve.context._get_global_client()
    assert connected is not None
    listening = connected.http_config
    if (listening.host, listening.port) != (config.host, config.port):
        raise ServingError(
            f"Serve on this cluster listens at {listening.host}:{listening.port} already, and "
            f"cannot at {config.host}:{config.port} too: set serve.host and serve.port to those"
        )
    following = follower.start(reference, version)
    try:
        try:
            serve.run(
                application(following, folder, version.name, config),
                name=version.name,
                route_prefix="/",
                logging_config=LoggingConfig(enable_access_log=False),
            )
        except RuntimeError as error:
            raise EndpointError(f"{reference} did not start: {error}") from error
        yield Live(f"http://{config.host}:{config.port}")
    finally:
        serve.delete(version.name)
        ray.kill(following)


def query(url: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Send rows to ``/predict``.

    Raises:
        EndpointError: for anything but a 200.
    """
    try:
        response = httpx.post(f"{url}/predict", json={"rows": rows}, timeout=QUERY_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise EndpointError(f"{url} does not answer: {error}") from error
    if response.status_code != 200:
        raise EndpointError(f"{url} answers {response.status_code}: {response.text[:500]}")
    value: dict[str, Any] = response.json()
    return value


def curl(url: str, row: dict[str, Any]) -> str:
    """A line that sends one row when pasted into a shell."""
    body = json.dumps({"rows": [row]}, separators=(",", ":"))
    return f"curl -s {url}/predict -H 'content-type: application/json' -d {shlex.quote(body)}"
