"""What is done with a registered version: serve it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lepton_ray.config import load
from lepton_ray.errors import InputError
from lepton_ray.jobs import session
from lepton_ray.pipeline import switching
from lepton_ray.serving import endpoint
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import registry


def serve_model(
    reference: str,
    *,
    port: int | None,
    settings: Sequence[str] = (),
    address: str | None,
    canary: str | None = None,
    shadow: str | None = None,
    detach: bool = False,
    terminal: Terminal,
) -> dict[str, Any]:
    """Serve a registered version until Ctrl-C, as its own experiment says.

    Args:
        settings: ``--set`` texts over the ``serve`` section of the experiment.
        canary, shadow: see `promotion.canary` and `switching.shadow`.
        detach: leave it up on a cluster, and return.

    Raises:
        InputError: for a setting of another section, for a canary or shadow of another model or of
            an endpoint that does not follow the champion, and to leave an endpoint on a Ray that
            ends with this command.
        ServingError: when the model is served on the cluster already.
    """
    version = registry.resolve(reference)
    for setting in settings:
        if not setting.startswith("serve."):
            text = "serve changes its own settings only, as serve.keys, but got"
            raise InputError(f"{text} --set {setting}: the model is as it was trained")
    own = [*settings, *([] if port is None else [f"serve.port={port}"])]
    config = load(version.folder() / "experiment.yaml", own).serve
    embedded = session.is_embedded(address)
    if detach and embedded:
        raise InputError("--detach leaves an endpoint on a cluster: name it with --address")
    for option, tried in (("canary", canary), ("shadow", shadow)):
        if tried and reference != f"{version.name}@champion":
            raise InputError(f"--{option} is for endpoints of NAME@champion, but got {reference!r}")
        if tried and registry.name_of(tried) != version.name:
            raise InputError(f"--{option} takes a version of {version.name}, but got {tried!r}")
    if embedded:
        endpoint.check_port(config.host, config.port)
    with session.session(address):
        session.check_gpus(config, session.possible(session.resources()))
        endpoint.check_free(reference)
        if canary:
            from lepton_ray.pipeline import promotion  # and torch, which takes 2 s

            promotion.canary(canary, terminal)
        if shadow:
            switching.shadow(shadow, terminal)
        with endpoint.serving(reference, config, stay=detach) as live:
            now = f"{reference}, version {version.version}," if "@" in reference else reference
            terminal.say(f"serve  {now} on {live.url}; docs at {live.url}/docs")
            if not detach:
                live.keep(terminal.say)
    return {"url": live.url, "name": version.name, "version": version.version}


def stop_serving(name: str, *, address: str | None, terminal: Terminal) -> dict[str, Any]:
    """End an endpoint that was left up on a cluster."""
    if session.is_embedded(address):
        raise InputError("--stop ends an endpoint on a cluster: name it with --address")
    name = registry.name_of(name)
    with session.session(address):
        endpoint.stop(name)
    terminal.say(f"serve  the endpoint of {name} has ended")
    return {"name": name}
