"""Images that are arrays already: the IDX files of MNIST, ``.npz``, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_ray.data import labels
from lepton_ray.data.split import Labels
from lepton_ray.errors import DataError

Array = npt.NDArray[np.generic]

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def sklearn_images(name: str) -> tuple[dict[str, Array], tuple[float, float]]:
    """The arrays, and the ends of their numbers."""
    if name != "digits":
        raise DataError(f"data.source 'sklearn:{name}' is not an image set; known: sklearn:digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"x": digits.images.astype(np.float32), "y": digits.target}, (0.0, 16.0)


def ends_of(x: Array) -> tuple[float | None, float | None]:
    """Between which numbers those of images lie: 0 and 255, 0 and 1, or of no known range, as where
    they were standardized before."""
    if x.dtype == np.uint8 or not len(x):
        return 0.0, 255.0
    least, most = float(x.min()), float(x.max())
    if least < 0 or most > 255:
        return None, None
    return 0.0, 1.0 if most <= 1 else 255.0


def npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from error
    if not ({"x", "y"} <= arrays.keys() or {"x_train", "y_train"} <= arrays.keys()):
        raise DataError(
            f"{path}: must hold x and y, or x_train, y_train, x_test and y_test; "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if "x_test" in arrays and "y_test" not in arrays:
        raise DataError(f"{path}: holds x_test but no y_test")
    return arrays


def idx_folder(folder: Path) -> dict[str, Array]:
    arrays = {}
    for name, stem in IDX_FILES.items():
        found = [p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()]
        if not found:
            raise DataError(f"{folder}: {stem}.gz is missing; an IDX folder holds four files")
        arrays[name] = _read_idx(found[0])
    return arrays


def _read_idx(path: Path) -> Array:
    """One IDX file (http://yann.lecun.com/exdb/mnist): magic, sizes, then bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if content[:3] != b"\0\0\x08":
        raise DataError(f"{path}: is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    values = np.frombuffer(content, np.uint8)[4 + 4 * rank :]
    if len(values) != math.prod(shape):
        raise DataError(f"{path}: holds {len(values)} values, but says that its shape is {shape}")
    return values.reshape(shape)


def labels_of(source: str, y: Array, given: Array | None) -> tuple[tuple[str, ...], Labels]:
    """The names of labels and which ones each image has; no names and classes where y is [n]."""
    if y.ndim != 2:
        return (), y.astype(np.str_)
    names = tuple(map(str, range(y.shape[1]) if given is None else given.tolist()))
    if len(names) != y.shape[1]:
        raise DataError(
            f"{source}: y has {y.shape[1]} columns of labels, but labels names {len(names)}"
        )
    if not np.isin(y, (0, 1)).all():
        raise DataError(
            f"{source}: y of several labels is 0 or 1 everywhere, but holds "
            f"{y[~np.isin(y, (0, 1))][0]}: repair it, or give one class for each image"
        )
    truth = y.astype(np.bool_)
    labels.check(source, names, truth)
    return names, truth
