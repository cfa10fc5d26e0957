"""A folder of pictures with a folder for each class: which files it holds, and what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import ImageData
from lepton_ray.data import pixels
from lepton_ray.data.images import FORMATS, Pixels
from lepton_ray.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
FORMS = (
    "a folder of pictures for each class (as cat/1.jpg and dog/2.png), or train/ and test/ of such "
    "folders"
)
NAMED = 3  # bad files that a message names


@dataclass(frozen=True, kw_only=True)
class Pictures:
    pixels: Pixels
    """[n, height, width] or [n, height, width, 3] Mapped from the cache, see `pixels`."""
    labels: npt.NDArray[np.str_]
    """[n] Names of the class folders."""
    given_test: npt.NDArray[np.bool_] | None
    """[n] Whether it lies under test/; None where there is no such folder."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    path: Path
    label: str
    is_test: bool


def find(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures anywhere in a folder, sorted, and how many other files there are of each ending.

    Which are pictures is told by the end of their names.
    """
    pictures = []
    others: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        # Thumbnails and the like that file managers leave behind lie in hidden folders.
        own = not any(_is_hidden(part) for part in path.relative_to(folder).parts)
        if own and path.suffix.lower() in SUFFIXES:
            pictures.append(path)
        else:
            others[_ending(path)] += 1
    return pictures, others


def read(data: ImageData) -> Pictures:
    """Every readable picture of the folder that is the source, with its class.

    The array of pixels is not held in memory here. `dataset.load` takes its splits out of it, and
    holds each sample's pixels once as they are and once as float32.

    Raises:
        DataError: for a folder of another form, classes without enough pictures, more unreadable
            pictures than ``max_bad``.
    """
    root = Path(data.source)
    files, others = _files(root)
    counts = Counter(file.label for file in files)
    _check_classes(root, counts)
    decoded = pixels.read([file.path for file in files], data.preprocess)
    bad = [f"{files[at].path.relative_to(root)} ({rule})" for at, rule in decoded.bad.items()]
    named = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    if len(bad) / len(files) > data.max_bad:
        raise DataError(
            f"{root}: {len(bad)} of {len(files)} pictures cannot be read, and data.max_bad allows "
            f"a share of {data.max_bad:g}: {named}: repair them or take them out, or raise "
            "data.max_bad"
        )
    good = [file for at, file in enumerate(files) if at not in decoded.bad]
    counts.subtract(files[at].label for at in decoded.bad)
    _check_classes(root, counts)
    height, width, *channels = decoded.pixels.shape[1:]
    color = "rgb" if channels else "grey"
    notes = [f"pictures are taken at {height} x {width} (height x width), {color}"]
    if decoded.size is not None:
        notes[0] += "; at the median they have {} x {} (data.preprocess)".format(*decoded.size)
    if bad:
        notes.append(f"{len(bad)} of {len(files)} cannot be read and are left out: {named}")
    if others:
        endings = ", ".join(f"{n} {ending}" for ending, n in others.most_common(NAMED))
        notes.append(f"{others.total()} other files are skipped: {endings}")
    given = np.array([file.is_test for file in good])
    return Pictures(
        pixels=decoded.pixels,
        labels=np.array([file.label for file in good], np.str_),
        given_test=given if given.any() else None,
        notes=tuple(notes),
    )


def _files(root: Path) -> tuple[list[_File], Counter[str]]:
    """All pictures in class folders, and how many other files there are of each ending.

    Raises:
        DataError: see `read`.
    """
    parts = {root: False}
    beside = {folder.name for folder in _folders(root)}
    if "train" in beside and _folders(root / "train"):
        parts = {root / name: name == "test" for name in ("train", "test") if name in beside}
        if more := sorted(beside - {"train", "test"}):
            raise DataError(
                f"{root}: beside train/ and test/ there is {more[0]}/: move its pictures into "
                "train/ (data.split.validation takes a share of them), or elsewhere"
            )
    files = []
    others = Counter[str]() if root in parts else _loose(root)
    for part, is_test in parts.items():
        classes = _folders(part)
        loose = _loose(part)
        if not classes:
            got = f"{loose.total()} files and no folder" if loose else "nothing"
            raise DataError(f"{part}: must hold {FORMS}, but holds {got}")
        others += loose
        for folder in classes:
            found, skipped = find(folder)
            others += skipped
            if not found:
                has = ", ".join(f"{n} {ending}" for ending, n in skipped.most_common(NAMED))
                raise DataError(
                    f"{folder}: a class folder must hold pictures ({', '.join(FORMATS)}), but "
                    f"holds {has or 'nothing'}: add some, or take the folder out"
                )
            files += [_File(path, folder.name, is_test) for path in found]
    return files, others


def _check_classes(root: Path, counts: Counter[str]) -> None:
    """
    Raises:
        DataError: when there is one class only, or a class of fewer than two pictures.
    """
    if len(counts) < 2:
        raise DataError(
            f"{root}: must hold {FORMS}, but holds one class only, {', '.join(counts)!r}: there is "
            "nothing to learn"
        )
    for label, n in counts.items():
        if n < 2:
            raise DataError(
                f"{root}: a class needs two pictures that can be read, one to learn and one to "
                f"test, but {label!r} has {n}: add some, or take its folder out"
            )


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not _is_hidden(p.name))


def _loose(folder: Path) -> Counter[str]:
    """How many files of each ending lie in it, and not deeper."""
    return Counter(_ending(path) for path in folder.iterdir() if not path.is_dir())


def _ending(path: Path) -> str:
    return path.suffix.lower() or path.name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
