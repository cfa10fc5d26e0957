"""The followers on this cluster: a detached actor for each model that has an endpoint."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton_ray.errors import ServingError
from lepton_ray.serving.follower import About, Follower, KeySource
from lepton_ray.tracking import store

NAMESPACE = "lepton_ray"
STOP_S = 10.0
HEAD = HEAD_NODE_RESOURCE_NAME  # of which the head has 1
HEAD_SHARE = 0.001


def start(reference: str, name: str, url: str, key_source: KeySource | None) -> tuple[Any, str]:
    """A follower on this node, where the registry can be reached, that outlives this process.

    Returns:
        Its handle and the id under which it reports.

    Raises:
        ServingError: when another is started at the same moment.
    """
    endpoint = uuid.uuid4().hex[:12]
    stop(name)  # one whose command was killed
    remote = ray.remote(Follower).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        **_here(),
        runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": store.absolute_uri()}},
    )
    try:
        made: Any = remote.remote(reference, endpoint, url, key_source)
        made.begin.remote()  # so that replicas, which load for seconds, find what they need
        return made, endpoint
    except ValueError as error:
        raise ServingError(f"another command has just begun to serve {name} here") from error


def _here() -> dict[str, Any]:
    """Options of an actor on this node; on the head, of one on whichever is the head, as it is
    another node when it starts again."""
    here = ray.get_runtime_context().get_node_id()
    if any(n["NodeID"] == here and HEAD in n["Resources"] for n in ray.nodes()):
        return {"resources": {HEAD: HEAD_SHARE}}
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def find(name: str) -> tuple[Any, About] | None:
    """The follower of a model's endpoint on this cluster, if it has one that answers."""
    try:
        actor: Any = ray.get_actor(name, namespace=NAMESPACE)
        return actor, ray.get(actor.about.remote(), timeout=STOP_S)
    except (ValueError, RayError, TimeoutError):
        return None


def stop(name: str) -> None:
    """End the follower of a model's endpoint on this cluster, if there is one."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    # Its name is free when it is gone, which is some milliseconds later.
    end = time.monotonic() + STOP_S
    while time.monotonic() < end:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)
