"""What a cluster file must hold beyond Ray's schema, so that it is safe, pinned and exact.

Pure: a file in, its problems out. `read` of `cluster_file` has checked keys and types before.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lepton_ray.jobs.cluster_file import MARKET, ClusterFile, texts

WORLD = ("0.0.0.0/0", "::/0")
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\w+://[^/\s:@]+:[^/\s@]+@"
    r"|(?i:password|passwd|secret(?:_access)?(?:_key)?|token|api_?key)\s*=\s*(?![$<])[^\s'\"]+"
)
NODE = re.compile(r"node\.sh (head|worker)\b")


def problems(file: ClusterFile, constraints: str) -> list[str]:
    """Every rule the file breaks: where, the rule, the way out.

    Args:
        constraints: content of constraints.txt.
    """
    rules: list[Callable[[ClusterFile], Iterator[str]]] = [
        _closed_to_the_world,
        _no_secrets,
        _token,
        _head_does_no_work,
        _market_labels,
        _one_kind_of_processor,
        _limits,
    ]
    if file.provider == "aws":
        rules.append(_aws)
    elif file.provider in ("gcp", "azure"):
        rules.append(_gcp if file.provider == "gcp" else _azure)
    elif file.provider == "local":
        rules.append(_local)
    found = [line for rule in rules for line in rule(file)]
    return found + list(_pinned(file, pins(constraints)))


def pins(constraints: str) -> dict[str, str]:
    """Package -> version."""
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    return {_name(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}


def _name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package.split("[")[0].strip().lower())


def _configs(file: ClusterFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in file.raw.get("available_node_types", {}).items():
        yield f"available_node_types.{name}.node_config", entry["node_config"]


def _closed_to_the_world(file: ClusterFile) -> Iterator[str]:
    for path, text in texts(file.raw):
        if any(world in text for world in WORLD):
            yield f"{path}: {text!r} lets in the whole world: name the addresses that may come"


def _no_secrets(file: ClusterFile) -> Iterator[str]:
    for path, text in texts(file.raw):
        if SECRET.search(text):
            yield (
                f"{path}: looks like a secret, and Ray prints this file to its logs: use a role of "
                "the machine, or a file of mode 0600 on it"
            )


def _token(file: ClusterFile) -> Iterator[str]:
    if file.provider == "kuberay":
        if file.raw["spec"].get("authOptions", {}).get("mode") != "token":
            yield "spec.authOptions: must be {mode: token}: without it everybody who reaches the "\
                "dashboard runs code"  # fmt: skip
        return
    for role in ("head", "worker"):
        key = f"{role}_start_ray_commands"
        commands = file.raw.get(key, [])
        if not any("RAY_AUTH_MODE=token" in c or NODE.search(c) for c in commands):
            yield (
                f"{key}: Ray starts without a token: start it by "
                f"`bash ~/lepton_ray/cluster/node.sh {role}`, or with RAY_AUTH_MODE=token"
            )
    carried = [*file.raw.get("cluster_synced_files", []), *file.raw.get("file_mounts", {})]
    if not any("auth_token" in path for path in carried):
        yield "cluster_synced_files: workers get no token: add ~/.ray/auth_token"


def _head_does_no_work(file: ClusterFile) -> Iterator[str]:
    head = file.head
    if file.provider != "local" and (head.cpus != 0 or head.gpus != 0):
        yield (
            f"{head.name}: the head must run no work, or a replica that takes its memory takes the "
            "cluster: set resources: {CPU: 0, GPU: 0}"
        )
    if head.spot:
        yield f"{head.name}: the head is a spot machine, and the cluster ends with it: on demand"


def _market_labels(file: ClusterFile) -> Iterator[str]:
    for kind in file.workers:
        label = kind.labels.get(MARKET)
        if kind.spot and label != "spot":
            yield (
                f"{kind.name}: spot machines without the label {MARKET}: spot, by which guaranteed "
                "replicas keep off them"
            )
        if not kind.spot and label == "spot":
            yield f"{kind.name}: labelled {MARKET}: spot, but the machines are on demand"


def _one_kind_of_processor(file: ClusterFile) -> Iterator[str]:
    for what, kinds in (
        ("CPU", [t for t in file.workers if not t.gpus]),
        ("GPU", [t for t in file.workers if t.gpus]),
    ):
        families = sorted({t.family for t in kinds if t.machine})
        if len(families) > 1:
            yield (
                f"available_node_types: {what} machines of {len(families)} families "
                f"({', '.join(families)}): replicas of an exact run on them compute different "
                "bytes, and those of the second are refused: keep one"
            )


def _limits(file: ClusterFile) -> Iterator[str]:
    if file.provider == "kuberay":
        if "idleTimeoutSeconds" not in file.raw["spec"].get("autoscalerOptions", {}):
            yield "spec.autoscalerOptions.idleTimeoutSeconds: missing: idle machines cost money"
        return
    for key in ("max_workers", "idle_timeout_minutes", "upscaling_speed"):
        if key not in file.raw:
            yield f"{key}: missing: it limits what can be spent"
    for name, entry in file.raw.get("available_node_types", {}).items():
        if name != file.head.name and "max_workers" not in entry:
            yield f"available_node_types.{name}.max_workers: missing: it limits what can be spent"


def _aws(file: ClusterFile) -> Iterator[str]:
    for path, config in _configs(file):
        if not config.get("SecurityGroupIds"):
            yield f"{path}.SecurityGroupIds: missing: Ray would open port 22 to the whole world"
        if config.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{path}.MetadataOptions: must be {{HttpTokens: required}} (IMDSv2)"
        disks = config.get("BlockDeviceMappings", [])
        if not disks or not all(d.get("Ebs", {}).get("Encrypted") is True for d in disks):
            yield f"{path}.BlockDeviceMappings: every disk must have Ebs: {{Encrypted: true}}"
        if not config.get("IamInstanceProfile"):
            yield f"{path}.IamInstanceProfile: missing: Ray's own role has all of EC2 and S3"
    yield from _no_defaults(file)


def _gcp(file: ClusterFile) -> Iterator[str]:
    for path, config in _configs(file):
        where = config.get("networkInterfaces", [])
        if not where or any("/default" in str(n.get("subnetwork", "/default")) for n in where):
            yield f"{path}.networkInterfaces: the default network lets in ssh from the whole world"
        if not config.get("serviceAccounts"):
            yield f"{path}.serviceAccounts: missing: the project's default one may do too much"
        if config.get("machineType", "").startswith("n2-") and not config.get("minCpuPlatform"):
            yield f"{path}.minCpuPlatform: missing: n2 machines have one of two processors"
    yield from _no_defaults(file)


def _azure(file: ClusterFile) -> Iterator[str]:
    if file.raw["provider"].get("use_internal_ips") is not True:
        yield "provider.use_internal_ips: must be true: Ray's own rule opens port 22 to the world"
    if not file.raw["provider"].get("msi_name"):
        yield "provider.msi_name: missing: Ray would make an identity that owns the whole group"
    yield from _no_defaults(file)


def _no_defaults(file: ClusterFile) -> Iterator[str]:
    """Ray fills these in by commands that install versions of its own."""
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if key not in file.raw:
            yield f"{key}: missing: Ray would install what its defaults name; write [] for nothing"
    if file.raw["provider"].get("cache_stopped_nodes") is not False:
        yield "provider.cache_stopped_nodes: must be false: stopped machines cost their disks"


def _local(file: ClusterFile) -> Iterator[str]:
    provider = file.raw["provider"]
    workers = provider.get("worker_ips") or []
    if provider.get("head_ip") in workers:
        yield f"provider.worker_ips: {provider['head_ip']} is the head, which runs no work"
    if len(set(workers)) != len(workers):
        yield "provider.worker_ips: an address twice"
    if file.max_workers > len(workers):
        yield f"max_workers: {file.max_workers}, but there are {len(workers)} machines"


def _pinned(file: ClusterFile, versions: Mapping[str, str]) -> Iterator[str]:
    ray = versions["ray"]
    if file.provider == "kuberay":
        given = str(file.raw["spec"].get("rayVersion", ""))
        if given != ray:
            yield f"spec.rayVersion: {given!r}, but constraints.txt has {ray}"
    for path, text in texts(file.raw):
        for arguments in re.findall(r"pip3? install ([^;&|]*)", text):
            for package in _packages(arguments):
                name, _, version = package.partition("==")
                if not version or versions.get(_name(name), version) != version:
                    wanted = versions.get(_name(re.split(r"[<>=!~]", name)[0]), "VERSION")
                    yield f"{path}: installs {package!r}: pin it, =={wanted} as in constraints.txt"
        for version in re.findall(r"rayproject/ray(?:-ml)?:([\w.-]+)", text):
            if not version.startswith(ray):
                yield f"{path}: the image is of Ray {version}, constraints.txt has {ray}"


def _packages(arguments: str) -> list[str]:
    """What a `pip install` installs by name; none where constraints choose the versions."""
    words = shlex.split(arguments)
    if {"-c", "--constraint"} & set(words):
        return []
    return [word for word in words if not word.startswith("-")]
