"""Whether an experiment fits a cluster file, and what it costs: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lepton_ray.config.schema import Workers
from lepton_ray.errors import ClusterError
from lepton_ray.jobs.cluster_file import ClusterFile, NodeType
from lepton_ray.jobs.prices import Prices


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How an experiment lies on the machines of a cluster."""

    source: str
    machines: dict[str, int]
    """Type -> how many run at ``workers.max``; the head is one of them."""
    guaranteed: dict[str, int]
    """The same at ``workers.min``."""
    replicas: int
    """That have room at once, up to ``workers.max``."""
    usd_per_hour: tuple[float, float] | None
    """At ``workers.min`` and at ``workers.max``; None where a price is not known."""
    usd: float | None
    """For the estimated time, at ``workers.max``."""
    prices: str
    """Date of the table."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        def shown(machines: dict[str, int]) -> str:
            return ", ".join(f"{n} x {name}" for name, n in machines.items())

        lines = [
            f"  machines {shown(self.guaranteed)} for workers.min; {shown(self.machines)} for "
            f"{self.replicas} workers ({self.source})"
        ]
        if self.usd_per_hour is not None:
            low, high = self.usd_per_hour
            hour = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
            lines.append(
                f"  cost     about {hour} USD an hour, {self.usd:.2f} USD for the time above "
                f"(prices of {self.prices})"
            )
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])


def fit(file: ClusterFile, workers: Workers, seconds: float, prices: Prices) -> Fit:
    """Lay out the workers on the machines the cluster may start.

    Args:
        seconds: the experiment's estimated time, for its cost.

    Raises:
        ClusterError: when ``workers.min`` has no room, with what each type can hold.
    """
    room = {kind.name: _holds(kind, workers) for kind in file.workers}
    stays = [t for t in file.workers if not (workers.spot and t.spot)]
    comes = [t for t in file.workers if not workers.spot or t.spot]
    guaranteed, placed = _place(stays, room, workers.min, file.max_workers)
    if placed < workers.min:
        raise ClusterError(_refusal(file, workers, stays, room))
    left = file.max_workers - sum(guaranteed.values())
    taken = {t.name: guaranteed.get(t.name, 0) for t in file.workers}
    spare = [_less(t, taken[t.name]) for t in comes]
    # Machines that are there for the guaranteed ones may have room for live ones too.
    on_hand = 0 if workers.spot else _capacity(guaranteed, room) - workers.min
    wanted = max(0, workers.max - workers.min - on_hand)
    more, live = _place(spare, room, wanted, left)
    most = {name: guaranteed.get(name, 0) + more.get(name, 0) for name in {**guaranteed, **more}}
    for kind in file.workers:  # are there all the time
        for machines in (guaranteed, most):
            if kind.minimum > machines.get(kind.name, 0):
                machines[kind.name] = kind.minimum
    hours = seconds / 3600
    low, high = (_cost(file, machines, prices) for machines in (guaranteed, most))
    replicas = min(workers.max, workers.min + max(0, on_hand) + live)
    return Fit(
        source=file.source,
        machines={file.head.name: 1, **most},
        guaranteed={file.head.name: 1, **guaranteed},
        replicas=replicas,
        usd_per_hour=None if low is None or high is None else (low, high),
        usd=None if high is None else high * hours,
        prices=prices.date,
        warnings=tuple(_warnings(file, workers, replicas, most, prices)),
    )


def _holds(kind: NodeType, workers: Workers) -> float:
    """How many workers one machine has room for; infinite where only the cloud knows."""
    each = []
    if kind.cpus is not None:
        each.append(kind.cpus // workers.cpus)
    if workers.gpus:
        each.append(kind.gpus // workers.gpus)
    elif kind.gpus:
        return 0  # Ray keeps work without GPUs off these while others have room
    return min(each, default=float("inf"))


def _place(
    kinds: Sequence[NodeType], room: dict[str, float], workers: int, machines: int
) -> tuple[dict[str, int], int]:
    """Machines of each type for some workers, the types in order; and how many got room."""
    chosen: dict[str, int] = {}
    left = workers
    for kind in kinds:
        if left <= 0 or not room[kind.name]:
            continue
        each = min(room[kind.name], left)
        need = -(-left // int(each))
        n = max(0, min(need, kind.maximum, machines - sum(chosen.values())))
        if n:
            chosen[kind.name] = n
            left -= min(left, int(n * each))
    return chosen, workers - max(0, left)


def _capacity(machines: dict[str, int], room: dict[str, float]) -> int:
    held = sum(n * room[name] for name, n in machines.items())
    return int(min(held, 1_000_000))


def _less(kind: NodeType, taken: int) -> NodeType:
    return NodeType(**{**kind.__dict__, "maximum": kind.maximum - taken})


def _cost(file: ClusterFile, machines: dict[str, int], prices: Prices) -> float | None:
    """US dollars an hour, the head included; None when a price is not known."""
    total = 0.0
    kinds = {t.name: t for t in file.node_types}
    for name, n in {file.head.name: 1, **machines}.items():
        price = prices.of(kinds[name].machine, spot=kinds[name].spot)
        if price is None:
            return None
        total += n * price
    return total


def _refusal(
    file: ClusterFile, workers: Workers, stays: Sequence[NodeType], room: dict[str, float]
) -> str:
    what = f"{workers.cpus:g} CPU" + (f" and {workers.gpus:g} GPU" if workers.gpus else "")
    lines = [
        f"workers.min={workers.min} of {what} each does not fit {file.source} (at most "
        f"{file.max_workers} machines):"
    ]
    for kind in file.workers:
        cpus = "?" if kind.cpus is None else f"{kind.cpus:g}"
        has = f"{cpus} CPU, {kind.gpus:g} GPU"
        apart = "" if kind in stays else "; spot, for live replicas only (workers.spot)"
        lines.append(
            f"  {kind.name}: up to {kind.maximum} x {kind.machine or 'machine'} ({has}) hold "
            f"{room[kind.name]:g} workers each{apart}"
        )
    lines.append("lower workers.min, cpus or gpus, or give the file more or larger machines")
    return "\n".join(lines)


def _warnings(
    file: ClusterFile, workers: Workers, replicas: int, machines: dict[str, int], prices: Prices
) -> Iterator[str]:
    if replicas < workers.max:
        yield f"there is room for {replicas} of workers.max={workers.max}"
    kinds = {t.name: t for t in file.workers}
    families = sorted({kinds[n].family for n in machines if n in kinds and kinds[n].machine})
    if len(families) > 1:
        yield (
            f"machines of {len(families)} families ({', '.join(families)}) compute different "
            "bytes: of an exact run those of the second are refused"
        )
    if workers.spot and not any(t.spot for t in file.workers):
        yield "workers.spot is true, and the file has no spot machines: no live replica will come"
    for kind in file.node_types:
        used = kind.head or kind.name in machines
        if kind.machine and used and prices.of(kind.machine, spot=kind.spot) is None:
            yield f"no price of {kind.machine}: name it in a file of your own with --prices"
