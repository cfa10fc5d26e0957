"""What is done with a registered version: serve it, predict with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config import load
from lepton_ray.data import folders, frames
from lepton_ray.data.images import FORMATS, ImageError
from lepton_ray.data.schema import Column
from lepton_ray.errors import DataError, InputError
from lepton_ray.jobs import session
from lepton_ray.jobs.watchers import Terminal
from lepton_ray.pipeline import promotion
from lepton_ray.serving import endpoint, images
from lepton_ray.serving.load import load_model
from lepton_ray.serving.runtime import CHUNK, Runtime
from lepton_ray.tracking import registry


def serve_model(
    reference: str,
    *,
    port: int | None,
    address: str | None,
    canary: str | None = None,
    shadow: str | None = None,
    detach: bool = False,
    terminal: Terminal,
) -> dict[str, Any]:
    """Serve a registered version until Ctrl-C, as its own experiment says.

    Args:
        canary, shadow: see `promotion.canary` and `promotion.shadow`.
        detach: leave it up on a cluster, and return.

    Raises:
        InputError: for a canary or shadow of another model or of an endpoint that does not follow
            the champion, and to leave an endpoint on a Ray that ends with this command.
    """
    version = registry.resolve(reference)
    settings = load(version.folder() / "experiment.yaml").serve
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    embedded = session.is_embedded(address)
    if detach and embedded:
        raise InputError("--detach leaves an endpoint on a cluster: name it with --address")
    for option, tried in (("canary", canary), ("shadow", shadow)):
        if tried and reference != f"{version.name}@champion":
            raise InputError(f"--{option} is for endpoints of NAME@champion, but got {reference!r}")
        if tried and re.split("[@/]", tried)[0] != version.name:
            raise InputError(f"--{option} takes a version of {version.name}, but got {tried!r}")
    if embedded:
        endpoint.check_port(settings.host, settings.port)
    if canary:
        promotion.canary(canary, terminal)
    if shadow:
        promotion.shadow(shadow, terminal)
    with session.session(address), endpoint.serving(reference, settings, stay=detach) as live:
        terminal.say(
            f"serve  {version.name}/{version.version} on {live.url}; docs at {live.url}/docs"
        )
        if not detach:
            live.keep(terminal.say)
    return {"url": live.url, "name": version.name, "version": version.version}


def stop_serving(name: str, *, address: str | None, terminal: Terminal) -> dict[str, Any]:
    """End an endpoint that was left up on a cluster."""
    if session.is_embedded(address):
        raise InputError("--stop ends an endpoint on a cluster: name it with --address")
    name = re.split("[@/]", name)[0]
    with session.session(address):
        endpoint.stop(name)
    terminal.say(f"serve  the endpoint of {name} has ended")
    return {"name": name}


def predict_file(
    reference: str, paths: Sequence[str], *, output: str | None, terminal: Terminal
) -> dict[str, Any]:
    """Predict every row of a JSONL, CSV or Parquet file, or every picture of files and folders; one
    JSON line each, of a picture with its ``file``.

    Raises:
        InputError: for several files of rows, and what cannot be read; nothing is written then.
    """
    runtime = load_model(reference)
    given = [Path(path) for path in paths]
    if runtime.schema.columns[0].kind == "image" and all(map(_is_pictures, given)):
        lines = _picture_lines(runtime, given)
    elif len(given) == 1:
        texts = [c.name for c in runtime.schema.columns if c.kind == "text"]
        rows = frames.read_rows(given[0], texts)
        lines = [answer.model_dump_json() for answer in runtime.predict(rows)]
    else:
        raise InputError(
            f"predict takes one file of rows ({', '.join(frames.SUFFIXES)}) or, for a model of "
            f"images, pictures and folders of them, but got {len(given)} paths"
        )
    if output is None:
        for line in lines:
            terminal.say(line)
    else:
        Path(output).write_text("".join(line + "\n" for line in lines))
        terminal.say(f"{len(lines)} predictions written to {output}")
    return {"rows": len(lines), "output": output}


def _is_pictures(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in folders.SUFFIXES


def _picture_lines(runtime: Runtime, paths: Sequence[Path]) -> list[str]:
    (column,) = runtime.schema.columns
    files: list[Path] = []
    for path in paths:
        inside = folders.find(path)[0] if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: must hold pictures ({', '.join(FORMATS)}), but holds none")
        files += inside
    lines = []
    for first in range(0, len(files), CHUNK):  # so that only these are held as numbers
        some = files[first : first + CHUNK]
        rows = [{column.name: _pixels(column, file)} for file in some]
        for file, answer in zip(some, runtime.predict(rows), strict=True):
            lines.append(json.dumps({"file": str(file), **answer.model_dump()}))
    return lines


def _pixels(column: Column, file: Path) -> npt.NDArray[np.float32]:
    try:
        return images.decode(column, file.read_bytes(), FORMATS)
    except ImageError as error:
        raise DataError(f"{file}: {error}: repair it or take it out") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
