"""Whether a table or texts have several labels a row, as far as columns and cells say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lepton_ray.data import tables
from lepton_ray.data.labels import LISTS, SAYS
from lepton_ray.data.tables import MAX_CATEGORIES
from lepton_ray.pipeline.guesses import Guess
from lepton_ray.pipeline.profiles import Profile, says_split

if TYPE_CHECKING:
    import pandas as pd

NAMES = re.compile(r"^(label|tag|genre|topic|keyword|categor|class|target)(s|y|ies|es)?$", re.I)
COLUMNS = re.compile(r"^(label|tag|genre|topic|class|target)s?[_ .:-]", re.I)
SEPARATORS = ("|", ";", ",")
LONGEST = 60  # characters of a label


@dataclass(frozen=True)
class Labels:
    columns: tuple[str, ...]
    """One of cells with several labels, or those of 0 and 1."""
    separator: str | None
    reason: str

    @property
    def guesses(self) -> list[Guess]:
        """The settings that say so."""
        target = list(self.columns) if len(self.columns) > 1 else self.columns[0]
        found = [Guess("data.target", target, self.reason)]
        if self.separator is not None:
            found.append(Guess("data.separator", self.separator, "between the labels of a cell"))
        return found


def find(frame: pd.DataFrame, profiles: Mapping[Any, Profile], asked: str | None) -> Labels | None:
    """What makes it evident that a row has several labels; None where nothing does.

    That is a column of lists or of cells with something between, of a name such as ``tags``; or
    columns of 0 and 1 whose names begin alike (``label_x``), or which are all there is beside a
    text.

    Args:
        asked: the column to predict, or several with commas between, where a person named them.
    """
    if asked is not None and asked not in frame.columns:
        names = [name.strip() for name in asked.split(",")]
        if len(names) > 1 and set(names) <= set(frame.columns):
            return Labels(tuple(names), None, "as asked")
        return None
    cells = [asked] if asked is not None else [n for n in frame.columns if NAMES.match(str(n))]
    for name in cells:
        if (found := _of_cells(str(name), frame[name])) is not None:
            return found
    if asked is not None or cells:
        return None
    truths = [str(n) for n in frame.columns if _is_truth(frame[n])]
    named = [name for name in truths if COLUMNS.match(name)]
    if len(named) > 1:
        return Labels(tuple(named), None, "columns of 0 and 1, by their names")
    beside = {
        p.kind for n, p in profiles.items() if str(n) not in truths and not says_split(p, frame[n])
    }
    if len(truths) > 1 and "text" in beside and beside <= {"text", "useless"}:
        return Labels(tuple(truths), None, "all columns beside the texts are of 0 and 1")
    return None


def _of_cells(name: str, values: pd.Series) -> Labels | None:
    cells = values.dropna().tolist()
    if cells and all(isinstance(cell, LISTS) for cell in cells):
        if not all(isinstance(one, str) for cell in cells for one in cell):
            return None
        count = len({one for cell in cells for one in cell})
        return Labels((name,), None, f"lists of {count} labels") if count > 1 else None
    if not cells or not all(isinstance(cell, str) for cell in cells):
        return None
    for separator in SEPARATORS:
        rows = [{piece.strip() for piece in cell.split(separator)} - {""} for cell in cells]
        counts = Counter(label for row in rows for label in row)
        # Fewer labels than cells they are put together to: "Berlin, Germany" is one place.
        if (
            1 < len(counts) <= MAX_CATEGORIES
            and len(counts) < len({frozenset(row) for row in rows if row})
            and max(map(len, counts)) <= LONGEST
        ):
            return Labels((name,), separator, f"cells of {len(counts)} labels in all")
    return None


def _is_truth(values: pd.Series) -> bool:
    """Whether it says 0 or 1, false or true in every row, and both of them."""
    said = {text.lower() for text in set(tables.as_texts(values))}
    return len(said) == 2 and said <= SAYS.keys()
