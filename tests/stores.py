"""MLflow stores for tests."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from mlflow import MlflowClient


@functools.cache
def _empty() -> bytes:
    """A database without runs. Its fifty migrations take seconds, so they run once a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def new(folder: Path) -> str:
    """The address of a new store in a folder."""
    path = folder / "mlflow.db"
    path.write_bytes(_empty())
    return f"sqlite:///{path}"
