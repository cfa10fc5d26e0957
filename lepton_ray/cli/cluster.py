"""Commands on clusters and their jobs."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lepton_ray.cli.commands import Commands
from lepton_ray.cli.terminal import Terminal
from lepton_ray.errors import InputError

ADDRESS = "of the dashboard, http://HOST:8265; default RAY_ADDRESS"


def declare(commands: Commands) -> None:
    """Add submit and jobs."""
    submit = commands.add_on_file("submit", _submit, "run an experiment on a cluster, as a job")
    submit.add_argument("--address", help=ADDRESS)
    submit.add_argument("--command", dest="verb", default="run", choices=["run", "tune", "train"])
    submit.add_argument("--name", help="of the job; default the experiment's, with a digest")
    submit.add_argument("--no-wait", action="store_true", help="return when it is sent")
    submit.add_argument("--keep", action="store_true", help="leave the endpoint up")
    submit.add_argument("--retries", type=int, default=3, help="of a driver that died; default 3")
    submit.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="give the driver this variable of your environment, sealed (may be repeated)",
    )
    jobs = commands.add("jobs", _jobs, "list the jobs of a cluster; status, logs and stop of one")
    jobs.add_argument("action", choices=["list", "status", "logs", "stop"])
    jobs.add_argument("name", nargs="?", metavar="NAME", help="of the job")
    jobs.add_argument("--address", help=ADDRESS)
    jobs.add_argument("-f", "--follow", action="store_true", help="logs: until the job is over")


def _submit(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.jobs.submission import submit

    return submit(
        options.file,
        address=options.address,
        command=options.verb,
        settings=options.settings,
        name=options.name,
        secret=options.secret,
        retries=options.retries,
        keep=options.keep,
        wait=not options.no_wait,
        terminal=terminal,
    )


def _jobs(options: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from lepton_ray.jobs.server import Server
    from lepton_ray.jobs.submission import resolve

    if options.action != "list" and not options.name:
        raise InputError(f"jobs {options.action} needs a NAME, as jobs list shows them")
    server = Server(resolve(options.address))
    match options.action:
        case "list":
            found = server.jobs()
            for job in found:
                terminal.say(_line(job))
            if not found:
                terminal.say("no jobs yet")
            return {"jobs": [job.to_json() for job in found]}
        case "status":
            job = server.job(options.name)
            terminal.say(_line(job))
            if job.message:
                terminal.say(job.message)
            return job.to_json()
        case "logs" if options.follow:
            job = server.follow(options.name, lambda text: terminal.say(text.rstrip("\n")))
            return job.to_json()
        case "logs":
            text = server.logs(options.name)
            terminal.say(text.rstrip("\n"))
            return {"logs": text}
        case _:
            ran = server.stop(options.name)
            terminal.say(f"{options.name} {'is stopping' if ran else 'was over already'}")
            return {"stopped": ran}


def _line(job: Any) -> str:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "-"
    took = f"{(job.ended or time.time()) - job.started:.0f} s" if job.started else ""
    return f"{job.id:40} {job.status:10} {started}  {took}"
