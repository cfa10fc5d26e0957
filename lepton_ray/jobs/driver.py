"""A job on the head of its cluster: runs the command line, and again when that is killed.

``python -m lepton_ray.jobs.driver run --name NAME`` in the folder that `submission` sent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lepton_ray.config import load
from lepton_ray.errors import InputError, LeptonRayError
from lepton_ray.jobs import secrets
from lepton_ray.jobs.packing import EXPERIMENT
from lepton_ray.jobs.runs import RunFolder

JOBS = "~/.lepton_ray/jobs"
FINAL = (0, 1, 2)  # done, the run failed, the input is wrong: trying again gives the same
PAUSE_S = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the last try."""
    parser = argparse.ArgumentParser(description="run a job on the head of a cluster")
    parser.add_argument("command", choices=["run", "tune", "train"])
    parser.add_argument("--name", required=True)
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--resume", action="store_true", help="it was started before")
    options = parser.parse_args(arguments)
    # A folder that stays, while Ray removes the one of a job that is over.
    folder = Path(os.environ.get("LEPTON_JOBS", JOBS)).expanduser() / options.name
    again = options.resume or folder.exists()
    shutil.copytree(Path.cwd(), folder, dirs_exist_ok=True)
    os.chdir(folder)
    try:
        environment = _environment(folder)
        settings = storage_settings(options.name)
    except LeptonRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    process: subprocess.Popen[bytes] | None = None
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for left in range(options.retries, -1, -1):
        words = [sys.executable, "-m", "lepton_ray", options.command, EXPERIMENT, *settings]
        words += ["--keep"] * options.keep
        if again and _is_unfinished(options.command, settings):
            words.append("--resume")
        process = subprocess.Popen(words, env=environment)
        code = process.wait()
        if code in FINAL or stopped or not left:
            return code if code >= 0 else 128 - code
        print(f"job    the driver ended with {code}, started again; {left - 1} more", flush=True)
        again = True
        time.sleep(PAUSE_S)
    raise AssertionError("the last try returns")


def _environment(folder: Path) -> dict[str, str]:
    """Of the command: with the job's secrets and its modules."""
    environment = dict(os.environ)
    sealed = environment.pop(secrets.VARIABLE, None)
    if sealed:
        environment |= secrets.unseal(sealed, secrets.token())
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{folder}:{path}" if path else str(folder)
    return environment


def storage_settings(name: str) -> list[str]:
    """``--set storage=...`` in the cluster's storage, unless the experiment names its own."""
    root = os.environ.get("LEPTON_STORAGE", "").rstrip("/")
    experiment = load(EXPERIMENT)
    if not root or experiment.storage != type(experiment).model_fields["storage"].default:
        return []
    return [f"--set=storage={root}/results/{name}"]


def _is_unfinished(command: str, settings: list[str]) -> bool:
    experiment = load(EXPERIMENT, [s.removeprefix("--set=") for s in settings])
    try:
        RunFolder.find_unfinished(experiment, command)
    except InputError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
