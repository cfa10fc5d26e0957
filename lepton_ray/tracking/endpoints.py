"""What the registry knows of a model's endpoints: which run, and what is tried on them.

All of it is in tags of the registered model, so that it outlives every process, and so that the
command line can ask and change it wherever the registry can be reached:

- ``lepton_ray.canary``: the `Canary` that endpoints of ``NAME@champion`` try now
- ``lepton_ray.shadow``: the version to which they send copies
- ``lepton_ray.canary.last``: what became of the last canary; the version itself is tagged
  ``lepton_ray.canary`` with the same
- ``lepton_ray.endpoint.ID``: what an endpoint told last (`Report`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow.exceptions import MlflowException

from lepton_ray.config import schema as config
from lepton_ray.data.drift import Drift
from lepton_ray.errors import ModelError
from lepton_ray.tracking import registry
from lepton_ray.tracking.canary import Canary, Counts, Decision, Tally
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.tracking.store import client

CANARY = "lepton_ray.canary"
SHADOW = "lepton_ray.shadow"
LAST = "lepton_ray.canary.last"
ENDPOINT = "lepton_ray.endpoint."
SILENT_S = 30.0  # after which an endpoint is taken for gone
FORGET_S = 3600.0
MOST_CHARS = 5000  # of a tag


@dataclass(frozen=True)
class Tried:
    """What is tried on the endpoints of a model now."""

    canary: Canary | None = None
    shadow: int | None = None
    last: dict[str, Any] | None = None


@dataclass(frozen=True)
class Port:
    """That the Serve of an endpoint has opened beside the endpoint's own."""

    number: int
    what: str
    local: bool
    """Whether it listens on loopback only."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an endpoint says of itself."""

    id: str
    url: str
    reference: str
    version: int
    replicas: int
    seen_s: float
    canary: str = ""
    """The id of the canary that was counted."""
    tally: Tally = field(default_factory=dict)
    decision: str = ""
    problem: str = ""
    drifts: dict[int, dict[str, Drift]] = field(default_factory=dict)
    """Version -> column -> how far requests are from its training data; the furthest only."""
    ports: tuple[Port, ...] = ()
    """On the machine of the one that reports."""


def tried(name: str) -> Tried:
    """
    Raises:
        ModelError: when there is no such model.
    """
    return tried_in(registry.model(name).tags)


def tried_in(tags: Mapping[str, str]) -> Tried:
    """The same, by a model's tags."""
    return Tried(
        Canary.from_json(json.loads(tags[CANARY])) if tags.get(CANARY) else None,
        int(tags[SHADOW]) if tags.get(SHADOW) else None,
        json.loads(tags[LAST]) if tags.get(LAST) else None,
    )


def start_canary(version: ModelVersion, share: float, settings: config.Canary) -> Canary:
    """Try a version on a share of the champion's callers; one that is tried already gets the share
    and goes on, and a shadow is one no more.

    Raises:
        ModelError: without a champion, or for the champion itself, or while another is tried.
    """
    with registry.promoting(version.name) as store:
        champion = registry.find_champion(version.name)
        if champion is None:
            raise ModelError(
                f"{version.name} has no champion beside which a canary could be tried: "
                f"lepton-ray models promote {version.name}/{version.version}"
            )
        if champion.version == version.version:
            raise ModelError(f"{version.name}/{version.version} is the champion already")
        there = tried(version.name)
        now = there.canary
        if now is not None and now.version != version.version:
            raise ModelError(
                f"{version.name}/{now.version} is tried now: end that with lepton-ray models "
                f"canary {version.name}"
            )
        if now is not None and now.instead_of == champion.version:
            made = dataclasses.replace(now, share=share)
        else:
            made = Canary(
                id=uuid.uuid4().hex[:12],
                version=version.version,
                share=share,
                instead_of=champion.version,
                started_s=time.time(),
                minutes=settings.minutes,
                sticky=settings.sticky.lower(),
                rule=settings.rule,
            )
        store.set_registered_model_tag(version.name, CANARY, json.dumps(made.to_json()))
        if there.shadow == version.version:  # its answers are compared from now on
            store.delete_registered_model_tag(version.name, SHADOW)
    return made


def set_shadow(name: str, version: int | None) -> None:
    """Send copies of the traffic to a version, or to none.

    Raises:
        ModelError: for the one that is tried as a canary.
    """
    store = client()
    canary = tried(name).canary
    if canary is not None and canary.version == version:
        raise ModelError(
            f"{name}/{version} is tried on {canary.share:.0%} of callers, and compared there: end "
            f"that first with lepton-ray models canary {name}"
        )
    if version is not None:
        store.set_registered_model_tag(name, SHADOW, str(version))
    elif SHADOW in registry.model(name).tags:
        store.delete_registered_model_tag(name, SHADOW)


def end_canary(name: str, canary: Canary, decision: Decision) -> bool:
    """Promote it or drop it; False when another endpoint or a person was quicker.

    Raises:
        ModelError: while another promotion is going on.
    """
    with registry.promoting(name) as store:
        now = tried(name).canary
        if now is None or now.id != canary.id:
            return False
        version = registry.resolve(f"{name}/{canary.version}")
        if decision.what == "promote":
            registry.promote_locked(store, version, instead_of=canary.instead_of)
        outcomes = {"promote": "promoted", "rollback": "rolled back", "end": "ended"}
        outcome = outcomes[decision.what]
        said = {"version": canary.version, "outcome": outcome, "reason": decision.reason}
        store.set_model_version_tag(
            name, str(canary.version), CANARY, f"{outcome}: {decision.reason}"[:MOST_CHARS]
        )
        store.set_registered_model_tag(name, LAST, json.dumps({**said, "at_s": time.time()}))
        store.delete_registered_model_tag(name, CANARY)
    return True


def report(name: str, said: Report) -> None:
    """Note that an endpoint runs."""
    store = client()
    text = json.dumps(dataclasses.asdict(said))
    if len(text) > MOST_CHARS:  # columns of long names
        text = json.dumps(dataclasses.asdict(dataclasses.replace(said, drifts={})))
    store.set_registered_model_tag(name, f"{ENDPOINT}{said.id}", text)


def forget(name: str, tags: Mapping[str, str], now_s: float) -> None:
    """Drop what endpoints said that have been silent for long.

    Args:
        tags: of the model.
        now_s: since the epoch.
    """
    for other in _reports(tags):
        if now_s - other.seen_s > FORGET_S:
            withdraw(name, other.id)


def withdraw(name: str, endpoint: str) -> None:
    """An endpoint has ended."""
    with contextlib.suppress(MlflowException):
        client().delete_registered_model_tag(name, f"{ENDPOINT}{endpoint}")


def reports(name: str) -> list[Report]:
    """What the endpoints of a model said last, of those too that are silent since."""
    return _reports(registry.model(name).tags)


def _reports(tags: Mapping[str, str]) -> list[Report]:
    found = []
    for key, text in sorted(tags.items()):
        if key.startswith(ENDPOINT) and text:
            value = json.loads(text)
            tally = {int(v): Counts.from_json(c) for v, c in value["tally"].items()}
            drifts = {
                int(v): {column: Drift(**d) for column, d in columns.items()}
                for v, columns in value.get("drifts", {}).items()
            }
            # Another lepton_ray may have told it, which knows other fields.
            known = {f.name for f in dataclasses.fields(Report)}
            told = {name: given for name, given in value.items() if name in known}
            ports = tuple(Port(**port) for port in value.get("ports", ()))
            found.append(Report(**{**told, "tally": tally, "drifts": drifts, "ports": ports}))
    return found


def overview(name: str | None = None) -> dict[str, tuple[Tried, list[Report]]]:
    """Of one model or of all that have an endpoint or something tried.

    Raises:
        ModelError: when there is no such model.
    """
    if name is not None:
        tags = registry.model(name).tags
        return {name: (tried_in(tags), _reports(tags))}
    every = {m.name: dict(m.tags) for m in client().search_registered_models()}
    found = {model: (tried_in(tags), _reports(tags)) for model, tags in every.items()}
    return {m: (t, r) for m, (t, r) in found.items() if r or t != Tried()}
