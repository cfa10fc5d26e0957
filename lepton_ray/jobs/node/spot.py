"""Turns a cloud's notice that a spot machine will be taken away into a drain of its Ray node.

``python -m lepton_ray.jobs.node.spot aws|gcp|azure HOST:PORT`` runs on every machine that may be
taken. Replicas on a draining node leave at the next step, so that none is lost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx

logger = logging.getLogger(__name__)

LOOK_S = 5.0
METADATA = os.environ.get("LEPTON_METADATA_URL", "http://169.254.169.254")


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away."""

    reason: str
    at: float
    """When, in seconds since 1970."""


def aws(http: httpx.Client) -> Notice | None:
    """EC2's spot instance action, two minutes ahead (IMDSv2)."""
    token = http.put(
        "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    ).raise_for_status()
    answer = http.get(
        "/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token.text},
    )
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    notice = answer.raise_for_status().json()
    return Notice(f"EC2 will {notice['action']} this spot instance", _seconds(notice["time"]))


def gcp(http: httpx.Client) -> Notice | None:
    """Compute Engine's mark on an instance that is being preempted, 30 s ahead."""
    answer = http.get(
        "/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
    ).raise_for_status()
    if answer.text.strip() != "TRUE":
        return None
    return Notice("Compute Engine preempts this instance", time.time() + 25)


def azure(http: httpx.Client) -> Notice | None:
    """Azure's scheduled event ``Preempt``, at least 30 s ahead."""
    answer = http.get(
        "/metadata/scheduledevents",
        params={"api-version": "2020-07-01"},
        headers={"Metadata": "true"},
    ).raise_for_status()
    return azure_notice(answer.json(), socket.gethostname())


def azure_notice(answer: dict[str, Any], machine: str) -> Notice | None:
    """The first event that takes this machine away; an answer names those of all its group."""
    for event in answer.get("Events", []):
        if event["EventType"] != "Preempt":
            continue
        if event["Resources"] and machine not in event["Resources"]:
            continue
        before = event.get("NotBefore")
        when = (
            datetime.datetime.strptime(before, "%a, %d %b %Y %H:%M:%S GMT")
            .replace(tzinfo=datetime.UTC)
            .timestamp()
            if before
            else time.time() + 25
        )
        return Notice("Azure evicts this spot machine", when)
    return None


ASK = {"aws": aws, "gcp": gcp, "azure": azure}


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def drain(address: str, notice: Notice) -> bool:
    """Ask the cluster to put nothing more on this machine's node; whether it accepted."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    gcs = GcsClient(address=address)
    node = _node_here(gcs)
    if node is None:
        return False
    accepted, why = gcs.drain_node(
        node,
        autoscaler_pb2.DrainNodeReason.Value(  # type: ignore[attr-defined]
            "DRAIN_NODE_REASON_PREEMPTION"
        ),
        notice.reason,
        int(notice.at * 1000),
    )
    if not accepted:
        logger.warning("the drain is refused: %s", why)
    return bool(accepted)


def _node_here(gcs: Any) -> str | None:
    """The id of the living node on this machine: the one whose address is ours."""
    from ray.core.generated import gcs_pb2

    for node in gcs.get_all_node_info().values():
        alive = node.state == gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE  # type: ignore[attr-defined]
        if alive and not node.is_head_node and _is_ours(node.node_manager_address):
            return bytes(node.node_id).hex()
    return None


def _is_ours(address: str) -> bool:
    """Whether one can listen at it."""
    with socket.socket() as tried:
        try:
            tried.bind((address, 0))
        except OSError:
            return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Look until a notice is there and the cluster knows of it."""
    parser = argparse.ArgumentParser(description="drain this node when its spot machine is taken")
    parser.add_argument("cloud", choices=sorted(ASK))
    parser.add_argument("address", help="of the GCS: HOST:PORT")
    parser.add_argument("--once", action="store_true", help="look once; print the notice as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # A proxy must never be asked what only this machine may know.
    with httpx.Client(base_url=METADATA, timeout=2, trust_env=False) as http:
        while True:
            notice = None
            try:
                notice = ASK[options.cloud](http)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                logger.warning("the notice cannot be read: %s", error)
            if options.once:
                print(json.dumps(notice and asdict(notice)))
                return 0
            if notice is not None:
                logger.info("%s", notice.reason)
                if drain(options.address, notice):
                    return 0
            time.sleep(LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
