"""Many pictures as one array on disk: decoded once, in threads, and mapped into memory.

The array lies in a folder of its own under ``$XDG_CACHE_HOME/lepton_ray/images`` (by default
``~/.cache``), named by a digest of the files and the shape. It is made aside and renamed when it is
whole, so that one that was left half-written is never read, and of two processes that make the same
one the second finds the first one's. The folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import PIL

from lepton_ray.config.schema import ImagePreprocess
from lepton_ray.data import images
from lepton_ray.data.images import ImageError, Pixels
from lepton_ray.errors import DataError

FORMAT = 1  # raise it when the same files come to have other pixels
LOOKED_AT = 1000  # pictures whose heads choose what the settings leave open
LONGEST = 64  # pixels of the longer side, where the settings leave it open
SHORTEST = 8
AT_ONCE = 512  # pictures that are decoded and not yet written


@dataclass(frozen=True)
class Decoded:
    pixels: Pixels
    """[n, height, width] or [n, height, width, 3] The readable pictures in their order, read from
    disk when they are used."""
    bad: dict[int, str]
    """Position of each unreadable picture -> the rule it breaks."""
    size: tuple[int, int] | None
    """(height, width) that the pictures have, each at the median; None where it was not asked."""


def read(paths: Sequence[Path], settings: ImagePreprocess) -> Decoded:
    """The pictures' pixels, from the cache when neither they nor their shape has changed.

    Raises:
        DataError: when the cache cannot be written.
    """
    shape, size = _shape(paths, settings)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lepton_ray" / "images" / _key(paths, shape)
    try:
        return _load(folder, size)
    except (OSError, ValueError):  # none, or one that is damaged and in the way
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            _make(whole, paths, shape)
            with contextlib.suppress(OSError):  # another process was quicker
                whole.rename(folder)
        return _load(folder, size)
    except OSError as error:
        raise DataError(
            f"the cache of decoded pictures {str(folder.parent)!r} cannot be written: {error}: set "
            "XDG_CACHE_HOME to a folder with room"
        ) from error


def _key(paths: Sequence[Path], shape: tuple[int, ...]) -> str:
    files = []
    for path in paths:
        try:
            state = path.stat()
            files.append([str(path.absolute()), state.st_size, state.st_mtime_ns])
        except OSError:  # a link to nothing: unreadable, as its decoding will say
            files.append([str(path.absolute()), None, None])
    return hashlib.sha256(json.dumps([FORMAT, PIL.__version__, shape, files]).encode()).hexdigest()


def _load(folder: Path, size: tuple[int, int] | None) -> Decoded:
    bad = {int(at): rule for at, rule in json.loads((folder / "bad.json").read_text()).items()}
    pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
    return Decoded(pixels[: len(pixels) - len(bad)], bad, size)


def _make(folder: Path, paths: Sequence[Path], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *shape)}
    bad: dict[int, str] = {}
    with (
        # Written, not mapped: a full disk is then an error and does not end the process.
        (folder / "pixels.npy").open("wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow lets other threads run
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(paths), AT_ONCE):
            some = paths[first : first + AT_ONCE]
            for position, found in enumerate(pool.map(_decode, some, [shape] * len(some)), first):
                if isinstance(found, str):
                    bad[position] = found
                else:
                    file.write(found.tobytes())
        file.write(bytes(len(bad) * math.prod(shape)))  # the header counts them
    (folder / "bad.json").write_text(json.dumps(bad))


def _decode(path: Path, shape: tuple[int, ...]) -> Pixels | str:
    """The pixels, or why there are none."""
    try:
        return images.decode(path.read_bytes(), shape, resized=True)
    except (ImageError, OSError) as error:
        return str(error)


def _shape(
    paths: Sequence[Path], settings: ImagePreprocess
) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """Of every picture's pixels, and the pictures' own size where that was looked at.

    What the settings leave open is the median height and width, made smaller to `LONGEST`; and grey
    where every picture is.
    """
    size, color, found = settings.size, settings.color, None
    if size is None or color is None:
        heads = [head for path in paths[:: -(-len(paths) // LOOKED_AT)] if (head := _head(path))]
        sizes = [size for size, _ in heads] or [(LONGEST, LONGEST)]
        height, width = (round(median(side)) for side in zip(*sizes, strict=True))
        found = (height, width)
        size = size or _smaller(height, width)
        color = color or ("grey" if all(grey for _, grey in heads) else "rgb")
    return (size if color == "grey" else (*size, 3)), found


def _smaller(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    if longer <= LONGEST:
        return height, width
    scale = LONGEST / longer
    return max(SHORTEST, round(height * scale)), max(SHORTEST, round(width * scale))


def _head(path: Path) -> tuple[tuple[int, int], bool] | None:
    """(height, width), and whether it is grey; None where it cannot be read."""
    try:
        with path.open("rb") as file, images.opened(file) as image:
            return images.size_of(image), image.mode in images.GREY
    except (ImageError, OSError):
        return None
