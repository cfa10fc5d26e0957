"""A guess: one setting of an experiment, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Guess:
    """One setting of an experiment."""

    path: str
    """Dotted, as in ``data.split.test``."""
    value: Any
    reason: str = ""
