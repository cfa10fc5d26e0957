"""Start, query and stop an endpoint on the Ray that this process is connected to."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from lepton_ray.config.schema import Serve
from lepton_ray.errors import EndpointError, ServingError
from lepton_ray.serving import follower, keys
from lepton_ray.serving.app import application
from lepton_ray.serving.client import Client
from lepton_ray.serving.follower import KeySource
from lepton_ray.serving.guard import needs_keys
from lepton_ray.tracking import endpoints, registry


@dataclass(frozen=True)
class Live:
    url: str
    key: str | None
    """For this process to check the endpoint; it ends with it. None where none is needed."""

    def client(self) -> Client:
        """One that is let in."""
        return Client(self.url, self.key)

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
def serving(reference: str, config: Serve, *, stay: bool = False) -> Iterator[Live]:
    """What a reference names, over HTTP, for the time of the block; an alias is followed.

    Args:
        stay: leave it up after the block, where no error ended that.

    Raises:
        ServingError: when the port is taken, or keys are needed and there are none.
        EndpointError: when the application does not become healthy.
    """
    source, key = _keys(config)
    if not serve.status().proxies:  # else the port is taken by the Serve that will answer
        check_port(config.host, config.port)
    version = registry.resolve(reference)
    serve.start(http_options={"host": config.host, "port": config.port})
    connected = serve.context._get_global_client()
    assert connected is not None
    listening = connected.http_config
    if (listening.host, listening.port) != (config.host, config.port):
        raise ServingError(
            f"Serve on this cluster listens at {listening.host}:{listening.port} already, and "
            f"cannot at {config.host}:{config.port} too: set serve.host and serve.port to those"
        )
    url = f"http://{_reachable(config.host)}:{config.port}"
    following, endpoint = follower.start(reference, version.name, url, source)
    ended = False
    try:
        try:
            serve.run(
                application(following, version.name, config),
                name=version.name,
                route_prefix="/",
                # Serve's own access log would name paths, and know no keys: `guard` writes ours.
                logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
            )
        except RuntimeError as error:
            raise EndpointError(f"{reference} did not start: {error}") from error
        yield Live(url, key)
        ended = not stay
    except BaseException:
        ended = True
        raise
    finally:
        if ended:
            serve.delete(version.name)
            follower.stop(version.name)
            endpoints.withdraw(version.name, endpoint)


def stop(name: str) -> None:
    """End the endpoint of a model that was left up on this cluster.

    Raises:
        ServingError: when there is none.
    """
    if name not in serve.status().applications:
        raise ServingError(f"no endpoint of {name!r} on this cluster: see lepton-ray status")
    serve.delete(name)
    endpoint = follower.endpoint_id(name)
    follower.stop(name)
    if endpoint is not None:
        endpoints.withdraw(name, endpoint)


def _keys(config: Serve) -> tuple[KeySource | None, str | None]:
    """Where an endpoint's keys are, and one more for this process; Nones where none are needed.

    Raises:
        ServingError: when keys are needed and the file has none, or cannot be used.
    """
    if not needs_keys(config.host, config.keys):
        return None, None
    path = Path(config.keys or keys.DEFAULT_FILE).absolute()
    try:
        if not keys.read(path):
            raise ServingError(f"the key file {path} has none: lepton-ray keys create NAME")
    except ServingError as error:
        why = "serve.keys is set" if config.keys else "it is not loopback"
        raise ServingError(f"an endpoint on {config.host} needs keys, as {why}: {error}") from error
    key, entry = keys.make("lepton-ray itself", ("predict",), None)
    return KeySource(path, (entry,)), key


def _reachable(host: str) -> str:
    """The host for a URL: an address that means all of them can be listened at, not called."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def curl(live: Live, row: dict[str, Any]) -> str:
    """A line that sends one row when pasted into a shell; a key is taken from ``$KEY``."""
    body = json.dumps({"rows": [row]}, separators=(",", ":"))
    key = ' -H "authorization: Bearer $KEY"' if live.key else ""
    return (
        f"curl -s {live.url}/predict -H 'content-type: application/json'{key} "
        f"-d {shlex.quote(body)}"
    )
