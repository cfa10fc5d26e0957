"""A real Prometheus, configured by cluster/observability/, on a real run of a real cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.test_demo import DIGITS, REPO
from tests.e2e.test_jobs import Cluster, free_ports, wait_for

OBSERVABILITY = REPO / "cluster" / "observability"
PROMETHEUS = shutil.which("prometheus")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.end()


def config(cluster: Cluster, target: Path) -> Path:
    """Ours, with this cluster's list of nodes, looked at often."""
    raw = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    raw["global"]["scrape_interval"] = "1s"
    (ray, endpoint) = raw["scrape_configs"]
    assert [ray["job_name"], endpoint["job_name"]] == ["ray", "endpoint"]
    (found,) = ray["file_sd_configs"]
    assert found["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    folder = target / "prometheus"
    folder.mkdir()
    found["files"] = [f"{cluster.folder}/ray/prom_metrics_service_discovery.json"]
    found["refresh_interval"] = "1s"
    shutil.copy(OBSERVABILITY / "alerts.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.mark.cluster
@pytest.mark.skipif(PROMETHEUS is None, reason="needs Debian's package prometheus")
def test_prometheus_shows_a_run_as_the_dashboard_asks(cluster: Cluster, tmp_path: Path) -> None:
    folder = config(cluster, tmp_path)
    checked = subprocess.run(
        ["promtool", "check", "config", str(folder / "prometheus.yml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (port,) = free_ports(1)
    assert PROMETHEUS is not None
    prometheus = subprocess.Popen(
        [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def asked(expression: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(
                f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression}
            ).json()
        except httpx.TransportError:
            return []
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    try:
        sent = cluster.ask(
            "submit", DIGITS, "--command", "run", "--name", "watched", "--no-wait", "--keep",
            "--set=workers.min=1", "--set=workers.max=1", "--set=tune.trials=2",
            f"--set=serve.port={free_ports(1)[0]}",
        )  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        wait_for(lambda: asked("ray_lepton_run_step == ray_lepton_run_steps"))
        dashboard = json.loads((OBSERVABILITY / "grafana.json").read_text())
        lossless = ("resizes", "losses", "redone", "stood_still")  # counters that nothing moved
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                if not any(name in expression for name in lossless):
                    wait_for(lambda e=expression: asked(e))
        (goodput,) = asked("ray_lepton_run_goodput")
        assert goodput["metric"]["experiment"] == "digits"
        assert 0.0 < float(goodput["value"][1]) <= 1.0
        trials = {
            r["metric"]["state"]: float(r["value"][1])
            for r in asked("ray_lepton_study_trials_total")
        }
        assert sum(trials.values()) == 2
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert {r["health"] for g in rules for r in g["rules"]} <= {"ok", "unknown"}
        cluster.ask("jobs", "stop", "watched")
    finally:
        prometheus.terminate()
        prometheus.wait(30)
