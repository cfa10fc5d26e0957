"""Send an experiment to a cluster, once, and see it through."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lepton_ray.config import load
from lepton_ray.errors import InputError, RunError
from lepton_ray.jobs import secrets
from lepton_ray.jobs.packing import pack
from lepton_ray.jobs.server import Job, LostJobError, Server
from lepton_ray.terminal import Silent, Terminal

COMMANDS = ("run", "tune", "train")


def submit(
    file: str | Path,
    *,
    address: str | None = None,
    command: str = "run",
    settings: Sequence[str] = (),
    name: str | None = None,
    secret: Sequence[str] = (),
    retries: int = 3,
    keep: bool = False,
    wait: bool = True,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """Run an experiment on a cluster; the same one again is the same job.

    A job of this name that runs is joined, one that is done is told, one that failed or was stopped
    goes on from its last checkpoint.

    Args:
        address: of the dashboard, ``http://HOST:8265``; default RAY_ADDRESS.
        command: ``run``, ``tune`` or ``train``.
        settings: ``PATH=VALUE``, as of ``--set``.
        name: of the job; default the experiment's, with a digest of all that is sent.
        secret: names of variables of this environment that the driver gets, sealed on the way.
        retries: how often a driver that died is started again, here and on the head.
        keep: leave the endpoint up; the job then goes on until it is stopped.
        wait: until it is over, passing on what it prints.

    Raises:
        InputError: when it cannot be sent, or another experiment has the name.
        RunError: when it failed.
    """
    terminal = terminal or Silent()
    experiment = load(file, settings)
    if command not in COMMANDS:
        raise InputError(f"command must be one of {', '.join(COMMANDS)}, but got {command!r}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"--name must be letters, digits, '.', '_' and '-', but got {name!r}")
    server = Server(resolve(address))
    with tempfile.TemporaryDirectory(prefix="lepton-job-") as folder:
        digest = pack(experiment, Path.cwd(), Path(folder))
        job_name = name or f"{experiment.name}-{command}-{digest[:8]}"
        # The job's own options belong to what makes it the same.
        identity = f"{digest} {command} {int(keep)}"
        sealed = secrets.seal(secret, os.environ, server.token if server.is_guarded else None)

        def send(resume: bool) -> None:
            words = ["python", "-m", "lepton_ray.jobs.driver", command, "--name", job_name,
                     "--retries", str(retries)]  # fmt: skip
            words += ["--keep"] * keep + ["--resume"] * resume
            server.submit(
                entrypoint=shlex.join(words),
                submission_id=job_name,
                runtime_env={"working_dir": folder, "env_vars": sealed},
                metadata={
                    "lepton_ray.experiment": experiment.name,
                    "lepton_ray.command": command,
                    "lepton_ray.digest": identity,
                },
            )

        known = server.find(job_name)
        job = _start(known, identity, server, send, terminal, job_name)
        if not wait:
            return job.to_json()
        if not job.is_over:
            job = _see_through(server, job_name, send, retries, terminal)
    if job.status != "SUCCEEDED":
        raise RunError(
            f"job {job_name} {job.status.lower()}: {job.message or 'see its log'}; the same "
            f"command again goes on with it; its log: lepton-ray jobs logs {job_name} --address "
            f"{server.url}"
        )
    return job.to_json()


def _start(
    known: Job | None, identity: str, server: Server, send: Any, terminal: Terminal, name: str
) -> Job:
    """The job, sent unless it is there."""
    if known is not None and known.digest != identity:
        raise InputError(
            f"a job named {name!r} is at {server.url}, and it is another experiment: choose "
            "another --name"
        )
    if known is None:
        send(False)
        terminal.say(f"job    {name} sent to {server.url}")
    elif known.status in ("FAILED", "STOPPED"):
        server.delete(name)
        send(True)
        terminal.say(f"job    {name} was {known.status.lower()}, goes on")
    elif known.is_over:
        terminal.say(f"job    {name} is done already; to run it again give it another --name")
    else:
        terminal.say(f"job    {name} runs already, joined")
    return server.job(name)


def _see_through(server: Server, name: str, send: Any, retries: int, terminal: Terminal) -> Job:
    """Until the job is over; sent again when it was lost with its head.

    Raises:
        RunError: when that happened too often, or it cannot be sent.
    """
    terminal.say(f"       Ctrl-C leaves it running; stop it with: lepton-ray jobs stop {name}")
    while True:
        try:
            job = server.follow(name, lambda text: terminal.say(text.rstrip("\n")))
            if not job.lost or retries <= 0:
                return job
            why = f": {job.message}"
            server.delete(name)
        except LostJobError:
            if retries <= 0:
                raise
            why = ""
        retries -= 1
        terminal.say(f"job    {name} was lost with the head it ran on, and is sent again{why}")
        try:
            send(True)
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"job {name} could not be sent again: {error}; the same command again goes on with "
                "it"
            ) from error


def resolve(address: str | None) -> str:
    """The dashboard's address.

    Raises:
        InputError: when none is named.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError(
            "jobs need a cluster: --address http://HOST:8265 or RAY_ADDRESS; `ray dashboard "
            "cluster/aws.yaml` forwards one to http://127.0.0.1:8265"
        )
    return address
