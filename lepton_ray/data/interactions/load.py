"""From a section of interactions to what a model trains on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.config.schema import InteractionData
from lepton_ray.data.dataset import Dataset, Samples
from lepton_ray.data.hands import Hands
from lepton_ray.data.interactions import source
from lepton_ray.data.interactions.fit import InteractionFit, fit
from lepton_ray.data.interactions.source import Indices, Interactions
from lepton_ray.data.order import generator
from lepton_ray.data.schema import Schema
from lepton_ray.errors import DataError

MAX_CELLS = 1 << 25  # users times items that a ranking is measured on; 128 MiB of scores
TRIES = 8  # to draw an item that the user has not taken


@dataclass(frozen=True, kw_only=True)
class Positives(Samples):
    """What users took, for a ranking; with items they did not take in each batch."""

    negatives: int
    items: int
    codes: npt.NDArray[np.int64]
    """user * (items + 1) + item of all of them, sorted."""

    def batch(self, rows: Indices, key: int) -> tuple[Any, Any]:
        """x [n, ..., 1 + negatives] with the item that was taken first; y zeros, its place."""
        x = self.x[rows]
        users = x[:, 0].astype(np.int64)[:, None] * (self.items + 1)
        draw = generator(key, "negatives")
        drawn = draw.integers(1, self.items + 1, (len(rows), self.negatives))
        for _ in range(TRIES):
            taken = self._is_taken(users + drawn)
            if not taken.any():
                break
            drawn[taken] = draw.integers(1, self.items + 1, int(taken.sum()))
        return np.concatenate([x, drawn.astype(np.float32)], axis=1), np.zeros(len(rows), np.int64)

    def _is_taken(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        at = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        found: npt.NDArray[np.bool_] = self.codes[at] == codes
        return found


def load(data: InteractionData, hands: Hands | None = None) -> Dataset:
    """Read, divide, and fit on the training interactions.

    Raises:
        DataError: see `source`.
    """
    all_ = source.read(data, hands)
    rows = source.divide(data, all_)
    parts = {name: all_.take(some) for name, some in rows.items()}
    ranking = data.task == "ranking"
    fitted = fit(
        parts["train"],
        user=data.user,
        item=data.item,
        user_features=data.features.user,
        item_features=data.features.item,
        ranking=ranking,
        had=[(parts[name].user, parts[name].item) for name in ("train", "validation")],
    )
    made = _ranking(data, fitted, parts) if ranking else _rating(data, fitted, parts)
    samples, columns, notes = made
    users, items = len(fitted.user.id.categories), len(fitted.item.id.categories)
    if users < 2 or items < 2:
        raise DataError(
            f"{data.source}: the training split must have two users and two items, but has {users} "
            f"and {items}: there is nothing to learn"
        )
    return Dataset(
        schema=Schema(
            columns=fitted.columns,
            target=data.item if ranking else str(data.rating),
            task="ranking" if ranking else "regression",
            items=fitted.item.id.categories if ranking else (),
            top_k=data.top_k if ranking else 0,
        ),
        preprocess=fitted,
        test_columns=columns,
        digest=_digest(all_, rows),
        notes=(
            f"{users:,} users and {items:,} items in the training split; split by {data.split_by}",
            *notes,
            *all_.notes,
        ),
        train=samples["train"],
        validation=samples["validation"],
        test=samples["test"],
    )


Made = tuple[dict[str, Samples], dict[str, npt.NDArray[Any]], list[str]]


def _columns(fitted: InteractionFit, data: InteractionData, part: Interactions) -> dict[str, Any]:
    ids = {data.user: part.user, data.item: part.item}
    return {c.name: {**ids, **part.features}[c.name] for c in fitted.columns}


def _rating(data: InteractionData, fitted: InteractionFit, parts: dict[str, Interactions]) -> Made:
    columns = {name: _columns(fitted, data, part) for name, part in parts.items()}
    samples = {
        name: Samples(x=fitted.apply(columns[name]), y=part.rating) for name, part in parts.items()
    }
    notes = []
    for column, index in (("user", 0), ("item", 1 + fitted.user.table.shape[1])):
        unseen = int((samples["test"].x[:, index] == 0).sum())
        if unseen:
            notes.append(f"{unseen:,} test ratings are of a {column} never seen in training")
    return samples, columns["test"], notes


def _ranking(data: InteractionData, fitted: InteractionFit, parts: dict[str, Interactions]) -> Made:
    items = len(fitted.item.id.categories)
    train = parts["train"]
    users = fitted.user.apply(_columns(fitted, data, train))
    taken = np.array([fitted.item.numbers[id_] for id_ in train.item], np.float32)
    codes = np.sort(users[:, 0].astype(np.int64) * (items + 1) + taken.astype(np.int64))
    samples: dict[str, Samples] = {
        "train": Positives(
            x=np.concatenate([users, taken[:, None]], axis=1),
            y=np.zeros(len(taken), np.int64),
            negatives=data.negatives,
            items=items,
            codes=codes,
        )
    }
    notes: list[str] = []
    most = max(1, MAX_CELLS // items)
    for name in ("validation", "test"):
        # What was there before is no answer: a model has learnt it, or its threshold was set on it.
        had = [train] if name == "validation" else [train, parts["validation"]]
        samples[name], columns = _users(data, fitted, parts[name], had, most)
        wanted = len(np.unique(parts[name].user.astype(np.str_)))
        if len(samples[name]) == 0:
            raise DataError(
                f"{data.source}: no item of the {name} split is in the training split: add "
                "interactions, or set split.by: random"
            )
        if len(samples[name]) < wanted:
            notes.append(
                f"{name} ranks for {len(samples[name]):,} of {wanted:,} users: at most {most:,}, "
                "and those who took an item of the training split"
            )
    return samples, columns, notes


def _users(
    data: InteractionData,
    fitted: InteractionFit,
    part: Interactions,
    had: list[Interactions],
    most: int,
) -> tuple[Samples, dict[str, npt.NDArray[Any]]]:
    """One sample a user: y is 1 for each item taken in the part, -1 for those had before."""
    numbers = fitted.item.numbers
    known = np.array([id_ in numbers for id_ in part.item], np.bool_)
    part = part.take(np.flatnonzero(known))
    names, first = np.unique(part.user.astype(np.str_), return_index=True)
    chosen = np.sort(generator(data.split.seed, "users").permutation(len(names))[:most])
    row_of = {str(name): row for row, name in enumerate(names[chosen])}
    y = np.zeros((len(chosen), len(numbers)), np.int8)
    for value, some in [(-1, other) for other in had] + [(1, part)]:
        for user, item in zip(some.user, some.item, strict=True):
            row, number = row_of.get(user), numbers.get(item)
            if row is not None and number is not None and (value < 0 or y[row, number - 1] == 0):
                y[row, number - 1] = value
    columns = _columns(fitted, data, part.take(first[chosen]))
    return Samples(x=fitted.apply(columns), y=y), columns


def _digest(all_: Interactions, rows: dict[str, Indices]) -> str:
    digest = hashlib.sha256()
    for ids in (all_.user, all_.item):
        for id_ in ids:
            content = id_.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    numbers = {"rating": all_.rating, "time": all_.time, **all_.features, **rows}
    for name, values in numbers.items():
        if values is not None:
            digest.update(f"{name}|{values.dtype}|{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
