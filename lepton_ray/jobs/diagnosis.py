"""Why it is not running: facts about a cluster and a job in, findings with a way out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lepton_ray.jobs.cluster_file import ClusterFile

SILENT_S = 60.0  # the autoscaler writes its state every few seconds
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What waits for room: ``count`` times these resources."""

    resources: Mapping[str, float]
    count: int
    labels: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    address: str
    alive: bool
    head: bool
    resources: Mapping[str, float]
    draining: bool = False
    why_dead: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was seen. What could not be asked is left at its default and leads to no finding."""

    unreachable: str = ""
    """Why the job server gave nothing more."""
    nodes: Sequence[Node] = ()
    demands: Sequence[Demand] = ()
    pending_nodes: Sequence[str] = ()
    """As the autoscaler says: type and state."""
    failed_nodes: Sequence[str] = ()
    autoscaler_error: str = ""
    autoscaler_age_s: float | None = None
    """Since it last wrote its state; None without one."""
    autoscaler_reports: bool = True
    """It writes every few seconds; Ray's second one does so only when it does something."""
    autoscaler_log: str = ""
    job: str = ""
    job_status: str = ""
    job_message: str = ""
    job_log: str = ""
    tracking_error: str = ""
    """Why MLflow cannot be used from here."""
    file: ClusterFile | None = None
    """The cluster file, where it was given."""


@dataclass(frozen=True)
class Finding:
    what: str
    """One sentence."""
    do: str
    """The way out."""
    lines: tuple[str, ...] = field(default=())
    """Of a log, as evidence."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


CLOUD_ERRORS = (
    (
        r"VcpuLimitExceeded|MaxSpotInstanceCountExceeded|QUOTA_EXCEEDED|QuotaExceeded"
        r"|InstanceLimitExceeded|exceeding approved .* quota",
        "the cloud gives this account no more machines: its quota is used up",
        "ask the cloud for a higher quota, or lower max_workers of that type and workers.max",
    ),
    (
        r"InsufficientInstanceCapacity|ZONE_RESOURCE_POOL_EXHAUSTED|SkuNotAvailable"
        r"|AllocationFailed|SpotMaxPriceTooLow|UnfulfillableCapacity",
        "the cloud has no such machines left at this moment",
        "it is tried again by itself; name more zones at the top of the cluster file, or another "
        "type of machine",
    ),
    (
        r"UnauthorizedOperation|AccessDenied|PERMISSION_DENIED|AuthorizationFailed"
        r"|NoCredentialsError|InvalidClientTokenId|ExpiredToken",
        "the head may not start machines",
        "give its role what cluster/iam/ says: python cluster/aws_prepare.py, or gcp.sh, azure.sh",
    ),
    (
        r"InvalidAMIID|InvalidParameterValue|InvalidInstanceType|Unsupported:"
        r"|InvalidGroup\.NotFound|InvalidSubnetID",
        "the cloud refuses what the cluster file asks for",
        "correct the file after the line below, and `ray up` again",
    ),
)
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|running low on memory|CUDA out of memory|killed by the OOM killer", re.I
)
PREEMPTED = re.compile(r"preempt|spot instance|DRAIN_NODE_REASON_PREEMPTION", re.I)
STORAGE = re.compile(r"storage '[^']*' cannot be (?:written|read|opened)[^\n]*")
TRACKING = re.compile(r"the MLflow store \S+ cannot be used[^\n]*")
SETUP = re.compile(r"(?:NodeUpdater|SSH command failed|New status: (?:\S*)?update-failed)[^\n]*")


def diagnose(facts: Facts) -> list[Finding]:
    """All that is wrong, what explains most first; none when nothing is."""
    if facts.unreachable:
        return [Finding(facts.unreachable, "the message says how")]
    rules = (_autoscaler, _cloud, _setup, _waiting, _dead_nodes, _job, _tracking)
    return [finding for rule in rules for finding in rule(facts)]


def _autoscaler(facts: Facts) -> Iterator[Finding]:
    if facts.autoscaler_error:
        yield Finding(
            "the autoscaler has died: nothing starts or ends machines",
            "correct what its last lines say, then `ray up` again; idle machines go on costing",
            _last(facts.autoscaler_error),
        )
    elif (
        facts.autoscaler_age_s is not None
        and facts.autoscaler_age_s > SILENT_S
        and (facts.autoscaler_reports or _should_act(facts))
    ):
        yield Finding(
            f"the autoscaler is silent for {facts.autoscaler_age_s:.0f} s: nothing starts or ends "
            "machines",
            "its last lines may say why; `ray up` again starts it anew",
            _last(facts.autoscaler_log),
        )
    elif facts.autoscaler_age_s is None and facts.file is not None and facts.demands:
        yield Finding(
            "no autoscaler has ever reported: it did not start",
            "see /tmp/ray/session_latest/logs/monitor.out on the head (`ray exec`): a library of "
            "the cloud may be missing there",
        )


def _cloud(facts: Facts) -> Iterator[Finding]:
    told = "\n".join([*facts.failed_nodes, facts.autoscaler_log])
    for pattern, what, do in CLOUD_ERRORS:
        lines = [line for line in told.splitlines() if re.search(pattern, line)]
        if lines:
            yield Finding(what, do, (lines[-1].strip(),))


def _setup(facts: Facts) -> Iterator[Finding]:
    lines = facts.autoscaler_log.splitlines()
    failed = [n for n, line in enumerate(lines) if "update-failed" in line]
    if failed:
        end = failed[-1]
        yield Finding(
            "a machine came and could not be set up",
            "correct the command that failed (cluster/node.sh), and `ray up` again",
            tuple(line.strip() for line in lines[max(0, end - LAST_LINES) : end + 1]),
        )


def _waiting(facts: Facts) -> Iterator[Finding]:
    """What waits, against what there may be."""
    for demand in facts.demands:
        shown = _shown(demand)
        kinds = _fitting(demand, facts.file) if facts.file else None
        if kinds == []:
            assert facts.file is not None
            yield Finding(
                f"{shown} waits, and no type of machine in {facts.file.source} can hold it: "
                f"{_types(facts.file)}",
                "lower workers.cpus or workers.gpus, or give the file a larger type",
            )
        elif facts.pending_nodes:
            yield Finding(
                f"{shown} waits for machines that are on their way: "
                f"{'; '.join(facts.pending_nodes)}",
                "wait: a machine takes a minute or two, with a first installation several",
            )
        elif kinds is not None and facts.file is not None and _full(facts):
            yield Finding(
                f"{shown} waits, and the cluster has all the machines it may have: "
                f"{_types(facts.file)}",
                "raise max_workers in the cluster file and `ray up` again, or wait for other jobs",
            )
        elif facts.autoscaler_age_s is None:
            yield Finding(
                f"{shown} waits, and this cluster starts no machines: {_free(facts.nodes)}",
                "wait for other jobs, stop one (`lepton-ray jobs list`), or add a machine",
            )
        else:
            yield Finding(
                f"{shown} waits for the autoscaler",
                "wait some seconds; if it stays so, what else is found here explains it",
            )


def _should_act(facts: Facts) -> bool:
    """Something waits for which a machine could be started, and none is on its way."""
    if facts.file is None:
        return bool(facts.demands) and not facts.pending_nodes
    wanted = any(_fitting(demand, facts.file) for demand in facts.demands)
    return wanted and not facts.pending_nodes and not _full(facts)


def _fitting(demand: Demand, file: ClusterFile) -> list[str]:
    """Types that can hold it, whose resources are known or may suffice."""
    fitting = []
    for kind in file.workers:
        has = {"CPU": kind.cpus, "GPU": kind.gpus}
        enough = all(
            name not in has or has[name] is None or amount <= (has[name] or 0)
            for name, amount in demand.resources.items()
        )
        if enough and kind.maximum:
            fitting.append(kind.name)
    return fitting


def _full(facts: Facts) -> bool:
    assert facts.file is not None
    workers = sum(node.alive and not node.head for node in facts.nodes)
    return workers >= min(facts.file.max_workers, sum(t.maximum for t in facts.file.workers))


def _types(file: ClusterFile) -> str:
    return ", ".join(
        f"{t.maximum} x {t.name} ({'?' if t.cpus is None else f'{t.cpus:g}'} CPU, {t.gpus:g} GPU)"
        for t in file.workers
    )


def _free(nodes: Sequence[Node]) -> str:
    alive = [node for node in nodes if node.alive]
    cpus = sum(node.resources.get("CPU", 0) for node in alive)
    gpus = sum(node.resources.get("GPU", 0) for node in alive)
    return f"{len(alive)} machines with {cpus:g} CPUs and {gpus:g} GPUs"


def _dead_nodes(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.alive and node.draining:
            yield Finding(
                f"the machine {node.address} will be taken away",
                "nothing: its replicas leave before",
            )
        if node.alive or not node.why_dead:
            continue
        if PREEMPTED.search(node.why_dead):
            yield Finding(
                f"the spot machine {node.address} was taken away: {node.why_dead}",
                "nothing: training goes on with the others, and another machine is asked for",
            )
        elif "expected termination" not in node.why_dead:
            yield Finding(
                f"the machine {node.address} was lost: {node.why_dead}",
                "nothing, if it happens once: training goes on with the others",
            )


def _job(facts: Facts) -> Iterator[Finding]:
    if not facts.job:
        return
    log = facts.job_log
    storage, tracking = STORAGE.search(log), TRACKING.search(log)
    if storage:
        yield Finding(
            f"job {facts.job}: {storage[0]}",
            "see whether the bucket exists and the machines' role may write it (cluster/iam)",
        )
    if tracking:
        yield Finding(
            f"job {facts.job}: {tracking[0]}",
            "see ~/.lepton_ray/tracking.log on the head: `ray exec cluster/aws.yaml 'tail "
            "~/.lepton_ray/tracking.log'`",
        )
    if facts.job_status == "PENDING":
        yield Finding(
            f"job {facts.job} has not started: {facts.job_message or 'the head is preparing it'}",
            "wait some seconds; an old head may be out of memory: `ray exec ... free`",
        )
    if facts.job_status != "FAILED" or storage or tracking:
        return
    if OUT_OF_MEMORY.search(log):
        yield Finding(
            f"job {facts.job} ran out of memory",
            "lower train.batch, raise workers.cpus so that fewer replicas share a machine, or take "
            "a larger one; the same submit again goes on from the last checkpoint",
            _matching(log, OUT_OF_MEMORY),
        )
    elif errors := [line for line in log.splitlines() if line.startswith("error: ")]:
        yield Finding(
            f"job {facts.job} failed by an error of its code or input, not of the cluster",
            "correct it and submit again: lepton-ray jobs logs " + facts.job,
            (errors[-1], *_last(log, 6)),
        )
    elif PREEMPTED.search(log):
        yield Finding(
            f"job {facts.job} ended with machines that were taken away",
            "submit the same again: it goes on from the last checkpoint",
            _matching(log, PREEMPTED),
        )
    else:
        yield Finding(
            f"job {facts.job} failed: {facts.job_message}",
            "its last lines may say why; the same submit again goes on from the last checkpoint",
            _last(log),
        )


def _tracking(facts: Facts) -> Iterator[Finding]:
    if facts.tracking_error:
        yield Finding(facts.tracking_error, "training goes on, and what it records waits meanwhile")


def _matching(text: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if pattern.search(line))[-2:]


def _last(text: str, n: int = LAST_LINES) -> tuple[str, ...]:
    return tuple(line.rstrip() for line in text.strip().splitlines()[-n:])


def _shown(demand: Demand) -> str:
    what = ", ".join(f"{amount:g} {name}" for name, amount in sorted(demand.resources.items()))
    where = f" on {demand.labels}" if demand.labels else ""
    return f"{demand.count} x ({what or 'nothing'}){where}"
