"""From data to a live model on an elastic Ray cluster, from one experiment file.

Importing this package has no effects and imports neither torch, Ray nor MLflow: the public
names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Client": "lepton_ray.serving.client",
    "Experiment": "lepton_ray.pipeline.experiment",
    "LeptonRayError": "lepton_ray.errors",
    "load_model": "lepton_ray.serving.load",
}

__all__ = ["Client", "Experiment", "LeptonRayError", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
