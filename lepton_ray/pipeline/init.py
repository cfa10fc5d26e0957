"""Write an experiment for a person's data, with every guess and its reason."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lepton_ray import data
from lepton_ray.config import loads
from lepton_ray.config.schema import ImageData
from lepton_ray.data import folders, frames, sources
from lepton_ray.errors import DataError, InputError
from lepton_ray.pipeline import guess
from lepton_ray.pipeline.guesses import Guess
from lepton_ray.terminal import Terminal

FORMS = (
    f"{folders.FORMS}, the four IDX files of MNIST, or a file that ends with .npz, "
    f"{', '.join(frames.SUFFIXES)}"
)

SHOWN = ("data.", "model.name", "train.epochs", "train.batch", "gate.metric")


def init(
    source: str, *, output: str | None, target: str | None, force: bool, terminal: Terminal
) -> dict[str, Any]:
    """Guess an experiment on a file or folder and write it where nothing is yet.

    The data are read and split as a plan does, so that what is wrong with them is told here.

    Args:
        output: the experiment's file; default the data's name with ``.yaml``.
        target: the column to predict, instead of a guess.
        force: overwrite the file.

    Raises:
        InputError: when the file exists or cannot be written, or the data cannot be used.
    """
    path = Path(source)
    stem = path.resolve().name if path.is_dir() else path.stem
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:63] or "data"
    file = Path(output or f"{name}.yaml")
    if file.exists() and not force:
        raise InputError(f"{file} exists: --force overwrites it, -o FILE names another")
    guesses = [Guess("name", name), *_data(path, target)]
    # Any model makes it an experiment, and what the data say chooses the real one.
    on_data = loads(guess.render([*guesses, Guess("model.name", "mlp")], source), source)
    guesses += guess.training(data.load(on_data.data))
    text = guess.render(guesses, f"Written by lepton-ray init from {source}: change what is wrong.")
    loads(text, str(file))
    try:
        file.write_text(text)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error}: name another with -o") from error
    following = shlex.join(["lepton-ray", "run", str(file)])
    terminal.say(f"init   {file}")
    for made in guesses:
        if made.path.startswith(SHOWN) and made.reason:
            terminal.say(f"  {made.path:22} {made.value!s:.24}".ljust(50) + f" {made.reason:.90}")
    terminal.say(f"next   {following}")
    return {"file": str(file), "guesses": [asdict(made) for made in guesses], "next": following}


def _data(path: Path, target: str | None) -> list[Guess]:
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist (looked in {Path.cwd()})")
    if path.suffix in frames.SUFFIXES and path.is_file():
        return guess.rows(str(path), frames.read(str(path)), target)
    if path.is_file() and path.suffix != ".npz":
        raise DataError(f"{path}: must be {FORMS}")
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if path.is_dir() and not any(p.is_dir() or "-ubyte" in p.name for p in inside):
        holds = ", ".join(p.name for p in inside[:5]) or "nothing"
        raise DataError(f"{path}: must be {FORMS}; but it is a folder that holds {holds}")
    if target is not None:
        raise InputError(f"--target names a column, but {path} holds images: leave it out")
    return guess.pictures(str(path), sources.read(ImageData(kind="image", source=str(path))))
