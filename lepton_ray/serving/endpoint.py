"""Start, query and stop an endpoint on the Ray that this process is connected to."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from lepton_ray.config.schema import Serve
from lepton_ray.errors import EndpointError, ServingError
from lepton_ray.serving import followers, keys
from lepton_ray.serving.app import application
from lepton_ray.serving.client import Client
from lepton_ray.serving.follower import About, KeySource
from lepton_ray.serving.guard import needs_keys
from lepton_ray.tracking import endpoints, registry

LOOK_S = 2.0  # between two looks for what answers
STARTING_S = 60.0  # after its follower, an endpoint has its application
ALL_S = 3.0  # of the same answer, in which each replica had a turn and has asked its follower
FOLLOWED_S = 60.0  # in which an endpoint has changed to another version, with much to spare


@dataclass(frozen=True)
class Live:
    reference: str
    version: int
    """That the reference named when it started."""
    url: str
    key: str | None
    """For this process to check the endpoint; it ends with it. None where none is needed."""

    def client(self) -> Client:
        """One that is let in."""
        return Client(self.url, self.key)

    def keep(self, say: Callable[[str], None]) -> None:
        """Until Ctrl-C; tells what answers whenever that changes."""
        say("keep   serving; stop with Ctrl-C")
        told = f"version {self.version}"
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                found = followers.find(registry.name_of(self.reference))
                if found is not None and (now := found[1].answers) not in ("", told):
                    say(f"serve  {self.reference} is {now}")
                    told = now
                time.sleep(LOOK_S)


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


def check_free(reference: str, *, share: bool = False) -> None:
    """No other command serves the model on this cluster.

    Args:
        share: or one does with the same reference, see `serving`.

    Raises:
        ServingError: naming the endpoint that there is.
    """
    found = _there(reference)
    if found is None or (share and found[1].reference == reference):
        return
    name, about = registry.name_of(reference), found[1]
    raise ServingError(
        f"{name} is served on this cluster already: {about.reference} at {about.url}. Use that, "
        f"or end it where it was started, or with lepton-ray serve {name} --stop"
    )


@contextlib.contextmanager
def serving(
    reference: str, config: Serve, *, stay: bool = False, share: bool = False
) -> Iterator[Live]:
    """What a reference names, over HTTP, for the time of the block; an alias is followed.

    Args:
        stay: leave it up after the block, where no error ended that.
        share: take the endpoint of the same reference that this cluster has already, once it
            answers with the version that is named now, and leave it as it is.

    Raises:
        ServingError: when the port is taken, the model is served already, or keys are needed and
            there are none.
        EndpointError: when the application does not become healthy.
    """
    if share and (found := _there(reference)) and found[1].reference == reference:
        with _shared(*found) as live:
            yield live
        return
    source, key = _keys(config)
    if serve.status().proxies:  # its port is taken by the Serve that will answer
        _start(config)
    else:
        check_port(config.host, config.port)
    version = registry.resolve(reference)
    check_free(reference)
    url = f"http://{_reachable(config.host)}:{config.port}"
    # It loads MLflow, which takes seconds, while Serve starts.
    following, endpoint = followers.start(reference, version.name, url, source)
    ended = False
    try:
        _start(config)
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
        yield Live(reference, version.version, url, key)
        ended = not stay
    except BaseException:
        ended = True
        raise
    finally:
        if ended:
            try:
                if version.name in serve.status().applications:
                    serve.delete(version.name)
            finally:
                followers.stop(version.name)
                endpoints.withdraw(version.name, endpoint)


def _start(config: Serve) -> None:
    """Serve itself, on this cluster.

    Raises:
        ServingError: when it runs already, and listens elsewhere.
    """
    serve.start(http_options={"host": config.host, "port": config.port})
    connected = serve.context._get_global_client()
    assert connected is not None
    listening = connected.http_config
    if (listening.host, listening.port) != (config.host, config.port):
        raise ServingError(
            f"Serve on this cluster listens at {listening.host}:{listening.port} already, and "
            f"cannot at {config.host}:{config.port} too: set serve.host and serve.port to those"
        )


def stop(name: str) -> None:
    """End the endpoint of a model that was left up on this cluster.

    Raises:
        ServingError: when there is none.
    """
    if name not in serve.status().applications:
        raise ServingError(f"no endpoint of {name!r} on this cluster: see lepton-ray status")
    serve.delete(name)
    found = followers.find(name)
    followers.stop(name)
    if found is not None:
        endpoints.withdraw(name, found[1].id)


def _there(reference: str) -> tuple[Any, About] | None:
    """The endpoint of the model that this cluster has, or that is being started; not what is left
    of one whose command was killed."""
    name = registry.name_of(reference)
    found = followers.find(name)
    if found is None or name in serve.status().applications or found[1].age_s < STARTING_S:
        return found
    return None


@contextlib.contextmanager
def _shared(following: Any, about: About) -> Iterator[Live]:
    """An endpoint that another command has started.

    Raises:
        EndpointError: when it does not answer with the version that its reference names.
    """
    key, entry = None, None
    if about.guarded:
        key, entry = keys.make("lepton-ray itself", ("predict",), None)
        ray.get(following.admit.remote(entry))
    try:
        version = registry.resolve(about.reference).version
        _wait_for(version, about.url, key)
        yield Live(about.reference, version, about.url, key)
    finally:
        if entry is not None:
            with contextlib.suppress(RayError):  # a follower that ends forgets it by itself
                ray.get(following.dismiss.remote(entry))


def _wait_for(version: int, url: str, key: str | None) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    said = "nothing"
    start_s = other_s = time.monotonic()
    while (now_s := time.monotonic()) < start_s + FOLLOWED_S:
        good = False
        try:
            answer = httpx.get(f"{url}/health", headers=headers, timeout=FOLLOWED_S)
            said = answer.text[:200]
            good = answer.status_code == httpx.codes.OK and answer.json()["version"] == version
        except httpx.TransportError as error:
            said = str(error)
        if not good:
            other_s = now_s
        elif now_s >= other_s + ALL_S:
            return
        time.sleep(0.1)
    raise EndpointError(
        f"{url} does not answer with version {version} after {FOLLOWED_S:.0f} s; it said: {said}"
    )


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
