"""A data frame out of an R package, for `data_sets.py`; R itself is not needed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

WHEELS = (
    "rdata==1.1.0 --hash=sha256:12efb7597725d6db6cc78d84eb522a9634008f8fce1c2733b7fd42b9013bc41f",
    "xarray==2026.9.0 "
    "--hash=sha256:fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
)
"""What reads R's objects, and what that imports besides pandas."""


def frame(data: Path, name: str, libraries: Path) -> Any:
    """A table of a package's data as a pandas frame.

    Args:
        data: folder with ``Rdata.rdx``, which says where in ``Rdata.rdb`` each object is.
        libraries: folder with `WHEELS`.
    """
    sys.path.insert(0, str(libraries))
    try:
        from rdata.conversion import convert
        from rdata.parser import parse_data

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it guesses what is no file of its own
            index = convert(parse_data(gzip.decompress((data / "Rdata.rdx").read_bytes())))
            start, length = map(int, index["variables"][name])
            stored = (data / "Rdata.rdb").read_bytes()[start : start + length]
            return convert(parse_data(_unpacked(stored)))
    finally:
        sys.path.remove(str(libraries))


def _unpacked(stored: bytes) -> bytes:
    """Four bytes of its length, then maybe one that names its compression ("R Internals", 1.17)."""
    if stored[4:5] == b"2":
        return bz2.decompress(stored[5:])
    if stored[4:5] == b"Z":
        return lzma.decompress(
            stored[5:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]
        )
    return zlib.decompress(stored[4:])
