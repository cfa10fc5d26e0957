"""The experiment file: its schema, and how it is read, changed and written."""

from lepton_ray.config.load import (
    flatten,
    load,
    loads,
    render,
    settings_of,
    validate,
    with_settings,
)
from lepton_ray.config.schema import Experiment

__all__ = [
    "Experiment",
    "flatten",
    "load",
    "loads",
    "render",
    "settings_of",
    "validate",
    "with_settings",
]
