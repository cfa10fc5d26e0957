"""The manifest of a version's folder: which bytes belong to it, and what they were made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lepton_ray.errors import ModelError

FORMAT = 2  # raised with what a version holds; every earlier one can still be read
NAME = "manifest.json"
TORCH = "torch"  # key of how torch runs it on a GPU, see `torch_model.Form`


def sha256(path: Path) -> str:
    """Of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(folder: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Add the format and every file's digest to ``value`` and write it; the last file of all."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != NAME}
    manifest = {"format": FORMAT, **value, "files": files}
    (folder / NAME).write_text(json.dumps(manifest, indent=1))
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after all files it names were found unchanged.

    Raises:
        ModelError: for a newer format, or a file that is missing or was changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / NAME).read_text())
        format_ = int(manifest["format"])
        if format_ > FORMAT:  # before anything else is read, which may be of another form
            raise ModelError(
                f"{folder} has format {format_}, made by lepton_ray "
                f"{manifest.get('software', {}).get('lepton-ray', '?')}; this one reads up to "
                f"{FORMAT}: install a newer lepton_ray"
            )
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is not a model version of lepton_ray: {error}") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder}: {name} is missing")
        if sha256(path) != expected:
            raise ModelError(f"{folder}: {name} was changed after it was made (SHA-256 differs)")
    return manifest
