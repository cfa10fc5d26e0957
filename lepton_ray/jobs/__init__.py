"""Where runs happen and what is left of them: Ray sessions, run folders, clusters, jobs."""

from __future__ import annotations

from typing import Any

__all__ = ["submit"]


def __getattr__(name: str) -> Any:
    if name == "submit":
        from lepton_ray.jobs.submission import (
            submit,
        )  # brings Ray, which most of this does not need

        return submit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
