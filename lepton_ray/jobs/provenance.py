"""Where a run came from: commit, software, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

SOFTWARE = ("lepton-ray", "ray", "torch", "mlflow", "numpy")


def git_commit() -> str:
    """Commit of the working folder, with ``+changes`` when files differ from it; "" without git."""
    commit = _git("rev-parse", "HEAD")
    return commit + ("+changes" if commit and _git("status", "--porcelain", "-uno") else "")


def software() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in SOFTWARE}}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
