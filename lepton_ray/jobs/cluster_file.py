"""Reads a cluster file: what Ray's autoscaler may start, and what is wrong with it.

Both kinds are read: YAML for `ray up`, checked against Ray's own schema, and KubeRay's RayCluster.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lepton_ray.errors import ClusterError, nearest
from lepton_ray.jobs import prices
from lepton_ray.training.elasticity import SPOT

MARKET = next(iter(SPOT))  # the label that says which nodes may be taken away


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """One kind of machine that a cluster may have."""

    name: str
    machine: str
    """The cloud's name of it; "" for machines that are there anyhow."""
    head: bool
    spot: bool
    minimum: int
    maximum: int
    cpus: float | None
    """For replicas and trials, each machine; None where only the cloud knows."""
    gpus: float
    labels: Mapping[str, str]

    @property
    def family(self) -> str:
        """What machines must share so that their processors compute the same bytes."""
        return prices.family(self.machine)


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    source: str
    provider: str
    """``aws``, ``gcp``, ``azure``, ``local`` or ``kuberay``."""
    region: str
    max_workers: int
    node_types: tuple[NodeType, ...]
    raw: Mapping[str, Any]
    """The file as it is; of KubeRay's, the RayCluster."""

    @property
    def workers(self) -> tuple[NodeType, ...]:
        return tuple(t for t in self.node_types if not t.head)

    @property
    def head(self) -> NodeType:
        return next(t for t in self.node_types if t.head)


def read(path: str | Path) -> ClusterFile:
    """A cluster file.

    Raises:
        ClusterError: with every key that Ray does not know or that has a wrong type.
    """
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not valid YAML: {error}") from error
    return parse(documents, str(path))


def parse(documents: list[Any], source: str) -> ClusterFile:
    """See `read`."""
    for document in documents:
        if isinstance(document, dict) and document.get("kind") == "RayCluster":
            return _kuberay(document, source)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ClusterError(f"{source} is no cluster file: neither one of `ray up` nor a RayCluster")
    raw = documents[0]
    wrong = [_describe(error) for error in _validator().iter_errors(raw)]
    if wrong:
        raise ClusterError("\n".join([f"{source}:", *(f"  {line}" for line in wrong)]))
    provider = raw.get("provider", {}).get("type", "")
    region = raw.get("provider", {}).get("region") or raw.get("provider", {}).get("location") or ""
    if provider == "local":
        types = _local(raw["provider"])
    else:
        types = _types(raw, provider)
        if not any(t.head for t in types):
            given = raw.get("head_node_type")
            known = nearest(str(given), [t.name for t in types])
            raise ClusterError(
                f"{source}: head_node_type {given!r} is not among the types, {known}"
            )
    return ClusterFile(
        source=source,
        provider=provider,
        region=region,
        max_workers=raw.get("max_workers", sum(t.maximum for t in types)),
        node_types=tuple(types),
        raw=raw,
    )


@functools.lru_cache
def _validator() -> Any:
    import ray.autoscaler

    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    return jsonschema.Draft7Validator(json.loads(schema.read_text()))


def _describe(error: Any) -> str:
    """One line for a violation of Ray's schema."""
    where = ".".join(str(part) for part in error.absolute_path)
    at = f"{where}: " if where else ""
    if error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        unknown = sorted(error.instance.keys() - known.keys())
        return "; ".join(f"{at}unknown key {key!r}, {nearest(key, known)}" for key in unknown)
    return f"{at}{error.message}"


def _types(raw: Mapping[str, Any], provider: str) -> list[NodeType]:
    found = []
    for name, entry in raw.get("available_node_types", {}).items():
        config = entry["node_config"]
        machine = machine_of(config)
        listed = prices.machine(machine)
        resources = entry["resources"]
        cpus = resources.get("CPU", listed.cpus if listed else None)
        head = name == raw.get("head_node_type")
        maximum = 0 if head else entry.get("max_workers", raw.get("max_workers", 0))
        found.append(
            NodeType(
                name=name,
                machine=machine,
                head=head,
                spot=is_spot(config),
                minimum=0 if head else entry.get("min_workers", 0),
                maximum=maximum,
                cpus=cpus,
                gpus=float(resources.get("GPU", listed.gpus if listed else 0)),
                labels=entry.get("labels", {}),
            )
        )
    return found


def machine_of(config: Mapping[str, Any]) -> str:
    """The type of machine in the words of any of the clouds."""
    azure = config.get("azure_arm_parameters", {})
    return str(config.get("InstanceType") or config.get("machineType") or azure.get("vmSize") or "")


def is_spot(config: Mapping[str, Any]) -> bool:
    """Whether the cloud may take the machine away."""
    scheduling = config.get("scheduling") or {}
    entries = scheduling if isinstance(scheduling, list) else [scheduling]
    return (
        config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or any(e.get("provisioningModel") == "SPOT" or e.get("preemptible") for e in entries)
        or config.get("azure_arm_parameters", {}).get("priority") == "Spot"
    )


def _local(provider: Mapping[str, Any]) -> list[NodeType]:
    hosts = len(provider.get("worker_ips") or [])
    common: dict[str, Any] = {"machine": "", "spot": False, "gpus": 0.0, "labels": {}}
    return [
        NodeType(name="head", head=True, minimum=0, maximum=0, cpus=0, **common),
        NodeType(name="worker", head=False, minimum=hosts, maximum=hosts, cpus=None, **common),
    ]


def _kuberay(document: Mapping[str, Any], source: str) -> ClusterFile:
    try:
        spec = document["spec"]
        head = spec["headGroupSpec"]
        types = [_group({"groupName": "head", **head}, head=True)]
        types += [_group(group, head=False) for group in spec.get("workerGroupSpecs", [])]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ClusterError(f"{source} is no RayCluster: {error!r} is missing or wrong") from error
    return ClusterFile(
        source=source,
        provider="kuberay",
        region="",
        max_workers=sum(t.maximum for t in types),
        node_types=tuple(types),
        raw=document,
    )


def _group(group: Mapping[str, Any], *, head: bool) -> NodeType:
    pod = group["template"]["spec"]
    limits = pod["containers"][0].get("resources", {}).get("limits", {})
    started = group.get("rayStartParams", {})
    labels = group.get("labels", {})
    return NodeType(
        name=group["groupName"],
        machine=pod.get("nodeSelector", {}).get("node.kubernetes.io/instance-type", ""),
        head=head,
        spot=labels.get(MARKET) == "spot",
        minimum=0 if head else int(group.get("minReplicas", 0)),
        maximum=0 if head else int(group.get("maxReplicas", 0)),
        cpus=float(started.get("num-cpus", _quantity(limits.get("cpu", 0)))),
        gpus=float(started.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
        labels=labels,
    )


def _quantity(value: Any) -> float:
    """Kubernetes' ``500m`` and ``2``."""
    text = str(value)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a file with its dotted path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from texts(inner, f"{path}[{number}]")
    elif isinstance(value, str):
        yield path, value
