"""What the replicas of an endpoint and its follower tell each other. Replicas do without MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray

from lepton_ray.serving.drift import Seen
from lepton_ray.serving.files import Files
from lepton_ray.serving.keys import Key
from lepton_ray.serving.metrics import Snapshot
from lepton_ray.tracking.canary import Canary, Tally


@dataclass(frozen=True)
class Told:
    """What a replica has to say."""

    counted: Snapshot
    attempt: str
    tally: Tally
    """Since the last time."""
    refused: dict[int, str]
    """Version -> why this replica does not answer with it."""
    seen: Seen = field(default_factory=dict)
    """Since the last time."""


@dataclass(frozen=True)
class Present:
    """What a replica must know."""

    version: int
    canary: Canary | None
    shadow: int | None
    files: dict[int, ray.ObjectRef[Files]]
    """Of these versions."""
    keys: tuple[Key, ...]
    replicas: int
    """That have asked lately, at least 1."""
    problem: str
    """With the keys or the registry, or ""."""
    state: dict[str, Any]
    """Of what is tried, for ``/health``."""
