"""What machines cost: a table with its date, and a person's own over it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lepton_ray.errors import ClusterError, InputError, nearest
from lepton_ray.training.elasticity import SPOT

TYPE_LABELS = ("instance-type", "node.kubernetes.io/instance-type")
"""Labels of a Ray node that may name its type."""
TABLE = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Machine:
    cpus: float
    gpus: float
    usd: float
    """An hour, on demand."""
    spot_usd: float
    """An hour, when it may be taken away."""


@dataclass(frozen=True)
class Prices:
    """A table of machines by their clouds' names."""

    date: str
    machines: dict[str, Machine]

    def of(self, name: str, *, spot: bool) -> float | None:
        """US dollars an hour; None for a machine that is not in the table."""
        found = self.machines.get(name)
        if found is None:
            return None
        return found.spot_usd if spot else found.usd


def load(own: str | Path | None = None) -> Prices:
    """The table that comes with the package, with a person's file over it.

    Args:
        own: YAML of the same form; machines it does not name keep their price.

    Raises:
        InputError: when the file cannot be read, or is of another form.
    """
    table = _built_in()
    if own is None:
        return table
    over = _read(Path(own))
    return Prices(over.date, {**table.machines, **over.machines})


def machine(name: str) -> Machine | None:
    """A machine of the table that comes with the package."""
    return _built_in().machines.get(name)


def of_nodes(nodes: Iterable[Mapping[str, str]], each: float | None) -> float:
    """US dollars an hour of all nodes of a running cluster.

    Args:
        nodes: the labels of each.
        each: what a node costs, if the table is not to be asked.

    Raises:
        ClusterError: for a node whose price is not known.
    """
    return sum(each if each is not None else _of_node(labels) for labels in nodes)


def _of_node(labels: Mapping[str, str]) -> float:
    table = _read(TABLE)
    name = next((labels[label] for label in TYPE_LABELS if label in labels), None)
    found = table.of(name, spot=SPOT.items() <= labels.items()) if name else None
    if found is not None:
        return found
    what = "has no label that names its type" if name is None else f"is of type {name!r}"
    hint = f", {nearest(name, table.machines)}" if name else ""
    raise ClusterError(
        f"tune.budget.usd needs the price of every node, but one {what}{hint}: set "
        f"tune.budget.usd_per_hour, or start nodes with --labels {TYPE_LABELS[0]}=TYPE"
    )


def family(name: str) -> str:
    """The part of a machine's name that names its processor: its size cut away.

    ``m6i.2xlarge`` -> ``m6i``, ``n2-standard-8`` -> ``n2``, ``Standard_D8as_v5`` -> ``D-as_v5``.
    """
    azure = re.fullmatch(r"Standard_([A-Z]+)\d+(\w*)", name)
    if azure:
        return f"{azure[1]}-{azure[2]}"
    return re.split(r"[.-]", name)[0]


@functools.lru_cache
def _built_in() -> Prices:
    return _read(TABLE)


def _read(path: Path) -> Prices:
    try:
        raw: dict[str, Any] = yaml.safe_load(path.read_text())
        share = float(raw.get("spot_share", 1.0))
        return Prices(
            str(raw["date"]),
            {
                name: Machine(
                    float(entry["cpus"]),
                    float(entry.get("gpus", 0)),
                    float(entry["usd"]),
                    float(entry.get("spot_usd", entry["usd"] * share)),
                )
                for name, entry in raw["machines"].items()
            },
        )
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"the prices in {path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is no table of prices: {error!r}; it must read date: 2026-01-31 and machines: "
            "{NAME: {cpus: 8, gpus: 0, usd: 0.38, spot_usd: 0.15}}"
        ) from error
