"""Ray's job server: one way to reach it, with time limits and plain errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import httpx
import ray
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from lepton_ray.errors import ClusterError, InputError, RunError, nearest
from lepton_ray.jobs import secrets

CONNECT_S = 10.0
REQUEST_S = 60.0
RECONNECT_S = 600.0  # a head that restarts, a laptop that sleeps
PAUSE_S = 2.0
READY_S = 120.0
NOT_READY = "No available agent"  # of Ray, which starts jobs; the server answers before it is there
FORWARD = "`ray dashboard cluster/aws.yaml` forwards it to http://127.0.0.1:8265"


# Ray's own process beside a driver died, as with the head of a cluster that keeps its state.
LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_FAILURE")


class LostJobError(RunError):
    """The cluster does not know the job any more: its head was started anew."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as its cluster tells of it."""

    id: str
    status: str
    experiment: str
    command: str
    digest: str
    """Of what was packed."""
    message: str
    started: float | None
    ended: float | None
    """Seconds since 1970."""
    lost: bool
    """It failed through no fault of its driver, see `LOST`."""

    @property
    def is_over(self) -> bool:
        return JobStatus(self.status).is_terminal()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Client(JobSubmissionClient):
    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **{"timeout": REQUEST_S, **kwargs})


class Server:
    """The job server at an address.

    Raises:
        ClusterError: when nothing answers within 10 s, it lets us not in, or it is of another Ray.
    """

    def __init__(self, address: str) -> None:
        self.url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
        if not self.url.startswith(("http://", "https://")):
            raise ClusterError(
                f"--address {address}: jobs go to the dashboard's address, as http://HOST:8265; "
                f"{FORWARD}"
            )
        self.token = secrets.token()
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.is_guarded = _check(self.url, headers)
        self._client = _Client(self.url, headers=headers)

    def jobs(self) -> list[Job]:
        """Newest first; those submitted by other means too."""
        found = [_job(d) for d in self._client.list_jobs() if d.submission_id]
        return sorted(found, key=lambda job: -(job.started or 0))

    def job(self, name: str) -> Job:
        """One job.

        Raises:
            InputError: when the cluster knows no such job.
        """
        try:
            return _job(self._client.get_job_info(name))
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            known = nearest(name, [j.id for j in self.jobs()])
            raise InputError(f"no job {name!r} at {self.url}, {known}") from error

    def find(self, name: str) -> Job | None:
        """The same; None where there is no such job."""
        try:
            return _job(self._client.get_job_info(name))
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            return None

    def submit(self, **options: Any) -> str:
        """See `JobSubmissionClient.submit_job`; waits for a cluster that has only just started."""
        end = time.monotonic() + READY_S
        while True:
            try:
                return str(self._client.submit_job(**options))
            except RuntimeError as error:
                if NOT_READY not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(PAUSE_S)

    def delete(self, name: str) -> None:
        self._client.delete_job(name)

    def stop(self, name: str) -> bool:
        """Whether it ran."""
        self.job(name)
        return bool(self._client.stop_job(name))

    def logs(self, name: str) -> str:
        self.job(name)
        return str(self._client.get_job_logs(name))

    def status_text(self) -> dict[str, Any]:
        """What the autoscaler last said: ``text`` as of `ray status`, ``error``, ``time``."""
        plain = self._get("/api/cluster_status")["data"]
        formatted = self._get("/api/cluster_status?format=1")["data"]
        return {
            "text": formatted.get("clusterStatus") or "",
            "error": plain.get("autoscalingError") or "",
            "time": (plain.get("clusterStatus") or {}).get("time"),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """The machines, dead ones too, as the dashboard shows them."""
        found: list[dict[str, Any]] = self._get("/nodes?view=summary")["data"]["summary"]
        return found

    def node_log(self, node: str, filename: str, lines: int) -> str:
        """The last lines of one of Ray's own logs on a node; "" where it has none."""
        query = f"node_id={node}&filename={filename}&lines={lines}&filter_ansi_code=true"
        answer = self._client._do_request("GET", f"/api/v0/logs/file?{query}")
        return str(answer.text) if answer.status_code == httpx.codes.OK else ""

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._client._do_request("GET", path)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Pass on what the job prints until it is over, over lost connections.

        Raises:
            LostJobError: when the cluster does not know the job any more.
            ClusterError: when the cluster cannot be reached for ten minutes.
        """
        shown, lost_since = 0, None
        while True:
            try:
                for_now = asyncio.run(self._tail(name, shown, write))
                shown = for_now
                job = self.find(name)
                lost_since = None
                if job is None:
                    raise LostJobError(
                        f"{self.url} does not know job {name} any more: its head was started anew; "
                        "submit it again, and it goes on"
                    )
                if job.is_over:
                    rest = str(self._client.get_job_logs(name))
                    if len(rest) > shown:
                        write(rest[shown:])
                    return job
            except (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > RECONNECT_S:
                    raise ClusterError(
                        f"{self.url} cannot be reached since {RECONNECT_S:.0f} s: {error}; the job "
                        f"goes on there: lepton-ray jobs logs {name} --follow"
                    ) from error
            time.sleep(PAUSE_S)

    async def _tail(self, name: str, shown: int, write: Callable[[str], None]) -> int:
        """Characters of the log passed on, those of before included."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(name):
                seen += len(text)
                if seen > shown:
                    write(text[-(seen - shown) :])
                    shown = seen
        except (RuntimeError, aiohttp.ClientError, OSError):
            pass  # the next look at the job says why
        return shown


def _check(url: str, headers: dict[str, str]) -> bool:
    """Whether the server wants a token; see `Server` for what is raised."""
    try:
        bare = httpx.get(f"{url}/api/version", timeout=CONNECT_S)
        answer = httpx.get(f"{url}/api/version", headers=headers, timeout=CONNECT_S)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ClusterError(
            f"no job server answers at {url} within {CONNECT_S:.0f} s: {reason}; {FORWARD}"
        ) from error
    if answer.status_code in (401, 403):
        said = "is wrong" if headers else "is missing"
        raise ClusterError(
            f"{url} lets nobody in without its token, and ours {said}: fetch it with "
            "`ray rsync-down cluster/aws.yaml '~/.ray/auth_token' ~/.ray/auth_token`, or name "
            "its file in RAY_AUTH_TOKEN_PATH"
        )
    try:
        theirs = answer.raise_for_status().json()["ray_version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"what answers at {url} is no job server of Ray (status {answer.status_code}); "
            f"{FORWARD}"
        ) from error
    if theirs != ray.__version__:
        raise ClusterError(
            f"the cluster at {url} runs Ray {theirs}, and this is Ray {ray.__version__}: jobs need "
            "the same on both: make install, and ray up again with the same files"
        )
    return bare.status_code in (401, 403)


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        status=str(details.status.value),
        experiment=metadata.get("lepton_ray.experiment", ""),
        command=metadata.get("lepton_ray.command", ""),
        digest=metadata.get("lepton_ray.digest", ""),
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        lost=details.status is JobStatus.FAILED and details.error_type in LOST,
    )
