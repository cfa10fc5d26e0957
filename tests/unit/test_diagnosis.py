"""Why it is not running, from facts as clusters gave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lepton_ray.jobs import cluster_file
from lepton_ray.jobs.diagnosis import Demand, Facts, Node, diagnose
from lepton_ray.jobs.facts import parse_nodes, parse_status

AWS = cluster_file.read(Path(__file__).parents[2] / "cluster/aws.yaml")
HEAD = Node(address="10.0.0.1", alive=True, head=True, resources={})
CPU = Demand(resources={"CPU": 1.0}, count=3)
GPU = Demand(resources={"CPU": 1.0, "GPU": 8.0}, count=1)


def worker(number: int, **more: Any) -> Node:
    return Node(
        **{"address": f"10.0.1.{number}", "alive": True, "head": False, "resources": {"CPU": 8.0}}
        | more
    )


@pytest.mark.parametrize(
    ("facts", "what", "do"),
    [
        (Facts(unreachable="no job server answers"), "no job server answers", "the message"),
        (
            Facts(demands=[GPU], file=AWS, autoscaler_age_s=1),
            "1 x (1 CPU, 8 GPU) waits, and no type of machine in",
            "lower workers.cpus or workers.gpus",
        ),
        (
            Facts(demands=[CPU], file=AWS, autoscaler_age_s=1, pending_nodes=["cpu, 1 launching"]),
            "3 x (1 CPU) waits for machines that are on their way: cpu, 1 launching",
            "wait",
        ),
        (
            Facts(
                demands=[CPU],
                file=AWS,
                autoscaler_age_s=1,
                nodes=[HEAD, *(worker(n) for n in range(20))],
            ),
            "has all the machines it may have: 4 x cpu (8 CPU, 0 GPU)",
            "raise max_workers",
        ),
        (
            Facts(demands=[CPU], nodes=[HEAD, worker(1)]),
            "this cluster starts no machines: 2 machines with 8 CPUs and 0 GPUs",
            "wait for other jobs",
        ),
        (Facts(autoscaler_error="ImportError: boto3"), "the autoscaler has died", "`ray up` again"),
        (Facts(autoscaler_age_s=300), "the autoscaler is silent for 300 s", "starts it anew"),
        (Facts(demands=[CPU], file=AWS), "no autoscaler has ever reported", "monitor.out"),
        (
            Facts(autoscaler_log="ClientError: (VcpuLimitExceeded) You have requested more vCPU"),
            "its quota is used up",
            "ask the cloud for a higher quota",
        ),
        (
            Facts(failed_nodes=["cpu_spot: LaunchFailed - InsufficientInstanceCapacity"]),
            "has no such machines left",
            "name more zones",
        ),
        (Facts(autoscaler_log="(UnauthorizedOperation)"), "may not start machines", "cluster/iam"),
        (Facts(autoscaler_log="(InvalidAMIID.NotFound)"), "refuses what the cluster file", "line"),
        (
            Facts(autoscaler_log="a\npip: no such package\nNew status: update-failed"),
            "a machine came and could not be set up",
            "node.sh",
        ),
        (Facts(nodes=[worker(1, draining=True)]), "10.0.1.1 will be taken away", "nothing"),
        (
            Facts(nodes=[worker(1, alive=False, why_dead="EC2 will terminate this spot instance")]),
            "the spot machine 10.0.1.1 was taken away",
            "training goes on",
        ),
        (
            Facts(nodes=[worker(1, alive=False, why_dead="health check failed")]),
            "the machine 10.0.1.1 was lost: health check failed",
            "if it happens once",
        ),
        (
            Facts(
                job="x",
                job_status="FAILED",
                job_log="ray.exceptions.OutOfMemoryError: Task was killed due to the node running "
                "low on memory.",
            ),
            "job x ran out of memory",
            "lower train.batch",
        ),
        (
            Facts(job="x", job_status="FAILED", job_log="...\nerror: worker 0 failed: KeyError"),
            "failed by an error of its code or input",
            "correct it",
        ),
        (
            Facts(job="x", job_status="FAILED", job_log="the node was preempted"),
            "ended with machines that were taken away",
            "from the last checkpoint",
        ),
        (
            Facts(
                job="x",
                job_status="FAILED",
                job_log="error: storage 's3://b' cannot be written: AccessDenied; set storage",
            ),
            "job x: storage 's3://b' cannot be written: AccessDenied",
            "cluster/iam",
        ),
        (
            Facts(
                job="x",
                job_status="RUNNING",
                job_log="the MLflow store http://h:5000 cannot be used: timeout; set",
            ),
            "job x: the MLflow store http://h:5000 cannot be used",
            "tracking.log",
        ),
        (Facts(job="x", job_status="PENDING"), "job x has not started", "wait"),
        (Facts(tracking_error="the MLflow store ..."), "the MLflow store", "training goes on"),
    ],
)
def test_each_cause_is_named_with_a_way_out(facts: Facts, what: str, do: str) -> None:
    findings = diagnose(facts)
    assert any(what in f.what and do in f.do for f in findings), findings


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert diagnose(Facts(nodes=[HEAD, worker(1)], autoscaler_age_s=2, file=AWS)) == []
    ended = worker(1, alive=False, why_dead="expected termination: idle")
    assert diagnose(Facts(nodes=[ended], job="x", job_status="SUCCEEDED")) == []


def test_an_autoscaler_that_writes_when_it_acts_may_be_silent() -> None:
    idle = Facts(autoscaler_age_s=300, autoscaler_reports=False, file=AWS, nodes=[HEAD])
    assert diagnose(idle) == []
    on_its_way = replace(idle, demands=[CPU], pending_nodes=["cpu, 1 launching"])
    assert not any("silent" in f.what for f in diagnose(on_its_way))
    dead = replace(idle, demands=[CPU])
    assert any("the autoscaler is silent for 300 s" in f.what for f in diagnose(dead))


def test_a_failed_setup_shows_its_last_lines() -> None:
    log = "\n".join([*(f"line {n}" for n in range(30)), "New status: update-failed", "later"])
    (finding,) = diagnose(Facts(autoscaler_log=log))
    assert finding.lines[-1] == "New status: update-failed"
    assert finding.lines[0] == "line 18"


STATUS = """======== Autoscaler status: 2026-11-24 10:20:30.123456 ========
Node status
---------------------------------------------------------------
Active:
 1 head
Idle:
 (no idle nodes)
Pending:
 cpu, 2 launching
 10.0.1.7: cpu_spot, setting-up
Recent failures:
 gpu_spot: LaunchFailed (latest_attempt: 10:20:01)

Resources
---------------------------------------------------------------
Total Usage:
 0B/4.00GiB memory
Pending Demands:
 {'CPU': 1.0}: 3+ pending tasks/actors
 {'GPU': 1.0, 'CPU': 1.0} * 2 (PACK): 1+ pending placement groups
"""


def test_the_text_of_ray_status_is_read() -> None:
    answer = {"text": STATUS, "error": "", "time": None}
    log = "2026-11-24 10:20:30,123\tINFO autoscaler.py:1 -- x\n"
    facts = parse_status(answer, log, now=0.0)
    assert facts.pending_nodes == ("cpu, 2 launching", "10.0.1.7: cpu_spot, setting-up")
    assert facts.failed_nodes == ("gpu_spot: LaunchFailed (latest_attempt: 10:20:01)",)
    assert [(d.resources, d.count) for d in facts.demands] == [
        ({"CPU": 1.0}, 3),
        ({"GPU": 1.0, "CPU": 1.0}, 2),
    ]
    assert facts.autoscaler_age_s == 0.0


def test_a_cluster_without_an_autoscaler_has_no_age() -> None:
    answer = {"text": STATUS, "error": "", "time": 5.0}
    read_only = (
        "2026-11-24 10:20:30,123 INFO No autoscaling config provided: use read only node provider."
    )
    assert parse_status(answer, read_only, 9.0).autoscaler_age_s is None
    assert parse_status(answer, "", 9.0).autoscaler_age_s is None
    assert parse_status(answer, "2026-11-24 10:20:30,123 x", 9.0).autoscaler_age_s == 4.0


def test_a_crash_in_the_log_is_the_autoscalers_end() -> None:
    log = "2026-11-24 10:20:30 x\nTraceback (most recent call last):\n  a\nImportError: boto3\n"
    facts = parse_status({"text": "", "error": "", "time": None}, log, 0.0)
    assert facts.autoscaler_error.endswith("ImportError: boto3\n")


def test_nodes_are_read_as_the_dashboard_gives_them() -> None:
    raylet = {
        "nodeId": "ab",
        "state": "DEAD",
        "nodeManagerAddress": "10.0.1.1",
        "stateMessage": "health check failed",
        "isHeadNode": False,
        "resourcesTotal": {"CPU": 8.0},
    }
    (node,) = parse_nodes([{"raylet": raylet}])
    assert (node.address, node.alive, node.why_dead) == ("10.0.1.1", False, "health check failed")
