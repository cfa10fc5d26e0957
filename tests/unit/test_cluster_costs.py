"""Whether an experiment fits a cluster file, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lepton_ray.config.schema import Workers
from lepton_ray.errors import ClusterError, InputError
from lepton_ray.jobs import cluster_file, prices
from lepton_ray.jobs.costs import fit

REPO = Path(__file__).parents[2]


def cluster(**changes: object) -> cluster_file.ClusterFile:
    """4 machines of 8 CPUs on demand, 12 of spot, 4 of spot with a GPU and 4 CPUs."""
    raw = yaml.safe_load((REPO / "cluster/aws.yaml").read_text())
    return cluster_file.parse([{**raw, **changes}], "aws.yaml")


def laid(seconds: float = 3600, file: cluster_file.ClusterFile | None = None, **workers: object):
    return fit(file or cluster(), Workers(**workers), seconds, prices.load())


def test_guaranteed_replicas_lie_on_demand_and_live_ones_on_spot() -> None:
    found = laid(min=10, max=30, spot=True)
    assert found.guaranteed == {"head": 1, "cpu": 2}
    assert found.machines == {"head": 1, "cpu": 2, "cpu_spot": 3}
    assert found.replicas == 30
    low, high = found.usd_per_hour or (0, 0)
    assert low == pytest.approx(0.192 + 2 * 0.384)
    assert high == pytest.approx(low + 3 * 0.384 * 0.4)
    assert found.usd == pytest.approx(high)
    assert "2 x cpu" in found.table()


def test_one_machine_holds_live_replicas_too() -> None:
    found = laid(min=1, max=8, cpus=1)
    assert found.machines == {"head": 1, "cpu": 1}
    assert laid(1800, min=1, max=8).usd == pytest.approx((0.192 + 0.384) / 2)


def test_gpus_go_where_gpus_are() -> None:
    found = laid(min=2, max=3, gpus=1, cpus=2)
    assert found.machines == {"head": 1, "gpu_spot": 3}
    with pytest.raises(ClusterError, match="hold 0 workers each"):
        laid(min=1, max=1, gpus=2)


def test_what_does_not_fit_is_told_for_each_type() -> None:
    with pytest.raises(ClusterError) as caught:
        laid(min=40, max=40, spot=True)
    said = str(caught.value)
    assert "workers.min=40 of 1 CPU each does not fit aws.yaml" in said
    assert "cpu: up to 4 x m6i.2xlarge (8 CPU, 0 GPU) hold 8 workers each" in said
    assert "cpu_spot: up to 12 x m6i.2xlarge (8 CPU, 0 GPU) hold 8 workers each; spot" in said
    with pytest.raises(ClusterError, match="hold 0 workers each"):
        laid(min=1, max=1, cpus=16)


def test_the_limit_of_all_machines_holds() -> None:
    small = cluster(max_workers=2)
    found = laid(min=1, max=64, cpus=1, file=small)
    assert sum(found.machines.values()) == 3, "and the head"
    assert found.replicas == 16
    assert "there is room for 16 of workers.max=64" in found.warnings
    with pytest.raises(ClusterError, match="at most 2 machines"):
        laid(min=17, max=17, file=small)


def test_mixed_processors_are_warned_of() -> None:
    raw = yaml.safe_load((REPO / "cluster/aws.yaml").read_text())
    types = {**raw["available_node_types"]}
    types["cpu"] = {**types["cpu"], "node_config": {**types["cpu"]["node_config"]}}
    types["cpu"]["node_config"]["InstanceType"] = "c6i.2xlarge"
    found = laid(min=1, max=30, spot=True, file=cluster(available_node_types=types))
    assert any("2 families (c6i, m6i)" in w for w in found.warnings)


def test_own_prices_lie_over_the_table(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("{date: 2026-01-01, machines: {m6i.2xlarge: {cpus: 8, usd: 1, spot_usd: 0.5}}}")
    found = fit(cluster(), Workers(min=1, max=1), 3600, prices.load(own))
    assert found.usd_per_hour == (pytest.approx(1.192), pytest.approx(1.192))
    assert "prices of 2026-01-01" in found.table()
    own.write_text("{machines: {}}")
    with pytest.raises(InputError, match="no table of prices"):
        prices.load(own)


def test_a_machine_without_a_price_is_told() -> None:
    raw = yaml.safe_load((REPO / "cluster/onprem.yaml").read_text())
    found = laid(min=1, max=2, file=cluster_file.parse([raw], "onprem.yaml"))
    assert (found.usd_per_hour, found.warnings) == (None, ())
    types = yaml.safe_load((REPO / "cluster/aws.yaml").read_text())["available_node_types"]
    types["head"]["node_config"]["InstanceType"] = "x9.huge"
    found = laid(min=1, max=1, file=cluster(available_node_types=types))
    assert found.usd_per_hour is None
    assert any("no price of x9.huge" in w for w in found.warnings)
