"""What a node costs: on-demand prices in USD per hour, as the providers listed them.

Prices change: the table is of the day in `AS_OF`, for the provider's first US region, and
``tune.budget.usd_per_hour`` replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lepton_ray.errors import ClusterError, nearest

AS_OF = "2025-01-01"
LABELS = ("instance-type", "node.kubernetes.io/instance-type", "ray.io/instance-type")
"""Node labels that may name a node's type (`ray start --labels instance-type=m5.large`)."""

USD_PER_HOUR = {
    # AWS, us-east-1
    "m5.large": 0.096,
    "m5.xlarge": 0.192,
    "m5.2xlarge": 0.384,
    "m5.4xlarge": 0.768,
    "c5.large": 0.085,
    "c5.xlarge": 0.17,
    "c5.2xlarge": 0.34,
    "c5.4xlarge": 0.68,
    "g4dn.xlarge": 0.526,
    "g4dn.2xlarge": 0.752,
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "p3.2xlarge": 3.06,
    # Google Cloud, us-central1
    "e2-standard-2": 0.067,
    "e2-standard-4": 0.134,
    "e2-standard-8": 0.268,
    "n2-standard-2": 0.097,
    "n2-standard-4": 0.194,
    "n2-standard-8": 0.388,
    # Azure, East US
    "Standard_D2s_v5": 0.096,
    "Standard_D4s_v5": 0.192,
    "Standard_D8s_v5": 0.384,
}


def usd_per_hour(nodes: Iterable[Mapping[str, str]], each: float | None) -> float:
    """Of all nodes together.

    Args:
        nodes: labels of each node.
        each: what a node costs, if the table is not to be asked.

    Raises:
        ClusterError: for a node whose price is not known.
    """
    return sum(each if each is not None else _of(labels) for labels in nodes)


def _of(labels: Mapping[str, str]) -> float:
    name = next((labels[label] for label in LABELS if label in labels), None)
    if name in USD_PER_HOUR:
        return USD_PER_HOUR[name]
    what = "has no label that names its type" if name is None else f"is of type {name!r}"
    hint = "" if name is None else f" ({nearest(name, USD_PER_HOUR)})"
    raise ClusterError(
        f"tune.budget.usd needs the price of every node, but one {what}{hint}: set "
        f"tune.budget.usd_per_hour, or start nodes with --labels {LABELS[0]}=TYPE"
    )
