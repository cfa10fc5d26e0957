"""What of a model's versions is changed without its data: they are not loaded, nor is torch."""

from __future__ import annotations

from typing import Any

from lepton_ray.errors import ModelError
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import endpoints, registry
from lepton_ray.tracking.canary import Decision


def rollback(name: str, terminal: Terminal) -> dict[str, Any]:
    """Make the champion before the present one champion again; no gate, since it passed one."""
    version = registry.rollback(name)
    terminal.say(f"{name}@champion is version {version.version} again")
    return {"name": name, "version": version.version}


def shadow(reference: str, terminal: Terminal) -> dict[str, Any]:
    """Send copies of the champion's traffic to ``NAME/9``; ``NAME`` ends that."""
    if "/" not in reference and "@" not in reference:
        endpoints.set_shadow(reference, None)
        terminal.say(f"no version of {reference} gets copies of the traffic")
        return {"name": reference, "version": None}
    version = registry.resolve(reference)
    endpoints.set_shadow(version.name, version.version)
    terminal.say(f"{version.name}/{version.version} gets copies of the traffic")
    return {"name": version.name, "version": version.version}


def end_canary(name: str, terminal: Terminal) -> dict[str, Any]:
    """End what is tried on the endpoints of a model.

    Raises:
        ModelError: when nothing is.
    """
    now = endpoints.tried(name).canary
    if now is None:
        raise ModelError(f"no version of {name!r} is tried: see lepton-ray status {name}")
    endpoints.end_canary(name, now, Decision("rollback", "it was ended by hand"))
    terminal.say(f"{name}/{now.version} is not tried any more")
    return {"name": name, "version": now.version}
