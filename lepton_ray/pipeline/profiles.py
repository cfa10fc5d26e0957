"""What the columns of a table seem to be, by their values and their names: pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lepton_ray.data import dates, tables
from lepton_ray.data.tables import MAX_CATEGORIES

if TYPE_CHECKING:
    import pandas as pd

ID = re.compile(r"(^|[_\W])(id|uuid|guid|index|key|no|nr)$", re.IGNORECASE)
FREE_TEXT_WORDS = (
    4  # from this median on, texts that are mostly distinct are read and not looked up
)
GROUP = re.compile(
    r"(^|[_\W])(patient|person|user|customer|client|account|member|household|session|subject|"
    r"device|machine|store|shop|id|uuid|guid)([_\W]?(id|no|nr|key))?$",
    re.IGNORECASE,
)
CODE = re.compile(r"(^|[_\W])(zip|zipcode|postcode|plz|code)$", re.IGNORECASE)
FEWEST_GROUPS = 10


@dataclass(frozen=True)
class Profile:
    """What a column of a table seems to be."""

    kind: Literal["number", "category", "date", "text", "useless"]
    reason: str
    words: float = 0.0
    """Of a text, at the median."""


def profile(name: str, values: pd.Series) -> Profile:
    """What a column seems to be, by its values and, for ids, its name."""
    import pandas as pd

    present = values.dropna()
    if present.map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
        return Profile("useless", "lists or objects")
    distinct, n = present.nunique(), len(values)
    if distinct < 2:
        return Profile("useless", "one value only" if distinct else "empty")
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        counted = distinct == n and is_whole(present)
        if counted and (ID.search(name) or (present.diff().dropna() == 1).all()):
            return Profile("useless", f"an id: {n:,} distinct whole numbers")
        return Profile("number", "numbers")
    if tables.guess(values) == "date":
        return Profile("date", "dates")
    texts = present.astype(str)
    words = float(texts.str.split().str.len().median())
    if distinct > n / 2 and words >= FREE_TEXT_WORDS:
        return Profile("text", f"{words:.0f} words at the median", words)
    if distinct > n / 2 or distinct > MAX_CATEGORIES:
        return Profile("useless", f"an id: {distinct:,} distinct texts in {n:,} rows")
    return Profile("category", f"{distinct} categories")


def says_split(known: Profile, values: pd.Series) -> bool:
    """Whether it says of every row that it is train or test, and nothing else."""
    return known.kind == "category" and set(values.map(str)) == {"train", "test"}


def is_whole(values: pd.Series) -> bool:
    """Whether all numbers are whole."""
    return bool((values % 1 == 0).all())


def is_group(name: str, values: pd.Series) -> bool:
    """Whether it names who a row is about, in several rows each."""
    import pandas as pd

    plain = pd.api.types.is_integer_dtype(values) or pd.api.types.is_string_dtype(values)
    if not plain or values.isna().any() or not GROUP.search(name):
        return False
    distinct = values.map(str).nunique()
    return bool(FEWEST_GROUPS <= distinct <= len(values) / 2)


def is_ordered(values: pd.Series) -> bool:
    """Whether the rows are in the order of these dates."""
    seconds = dates.seconds(tables.as_texts(values), dates.ISO)
    return bool((np.diff(seconds) >= 0).all() and seconds[0] < seconds[-1])


def is_code(name: str, known: Profile, values: pd.Series) -> bool:
    """Whether its numbers only name something, as a postcode does."""
    return known.kind == "number" and bool(CODE.search(name)) and is_whole(values.dropna())
