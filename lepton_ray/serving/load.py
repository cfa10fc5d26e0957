"""Open a registered version in this process."""

from __future__ import annotations

from lepton_ray.serving.runtime import Runtime
from lepton_ray.tracking import registry


def load_model(reference: str) -> Runtime:
    """The version that ``name@alias`` or ``name/version`` names now.

    Raises:
        ModelError: when there is none, or its files were changed or are of a newer format.
    """
    version = registry.resolve(reference)
    return Runtime.load(version.folder(), name=version.name, version=version.version)
