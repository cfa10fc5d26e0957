"""What is done with a registered version: serve it."""

from __future__ import annotations

from typing import Any

from lepton_ray.config import load
from lepton_ray.jobs import session
from lepton_ray.jobs.watchers import Terminal
from lepton_ray.serving import endpoint
from lepton_ray.tracking import registry


def serve_model(
    reference: str, *, port: int | None, address: str | None, terminal: Terminal
) -> dict[str, Any]:
    """Serve a registered version until Ctrl-C, as its own experiment says."""
    version = registry.resolve(reference)
    settings = load(version.folder() / "experiment.yaml").serve
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    if session.is_embedded(address):
        endpoint.check_port(settings.host, settings.port)
    with session.session(address), endpoint.serving(reference, settings) as live:
        terminal.say(
            f"serve  {version.name}/{version.version} on {live.url}; docs at {live.url}/docs"
        )
        live.keep(terminal.say)
    return {"url": live.url, "name": version.name, "version": version.version}
