"""What all sections have in common: frozen, unknown keys refused, no infinite numbers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class OpenSection(Section):
    """A section whose further keys go to a function by name (a model, an optimizer)."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The keys besides ``name``."""
        return dict(self.model_extra or {})
