"""Interactions as numbers: ids that are known, what is stored of them, and the rating's range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from lepton_ray.config.schema import TablePreprocess
from lepton_ray.data import preprocess, spread
from lepton_ray.data.hands import Own
from lepton_ray.data.interactions.source import Interactions
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Column

FORMAT = 1
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What the data tell a model of interactions. Number 0 is a user or an item never seen.

    A sample is ``[user, user features..., item, item features...]``; of a ranking, ``[user, user
    features...]`` and in training the numbers of the items to score behind it.
    """

    users: int
    """Known ones; numbers run from 1."""
    items: int
    user_features: int
    item_features: int
    ranking: bool
    item_table: Floats
    """[items + 1, item features] Of every item; a ranking looks them up here."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The users, or the items."""

    id: Column
    features: Preprocess | None
    table: Floats
    """[ids + 1, width] Their features as the model takes them; zeros for number 0."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Id -> number, from 1."""
        return {id_: number for number, id_ in enumerate(self.id.categories, 1)}

    def apply(self, columns: Mapping[str, Any]) -> Floats:
        """[n, 1 + width] Numbers and features of rows: those given, else those known of the id."""
        numbers = np.array([self.numbers.get(id_, 0) for id_ in columns[self.id.name]], np.int64)
        features = self.table[numbers]
        if self.features is not None:
            given = {c.name: columns.get(c.name) for c in self.features.columns}
            absent = {name: _absent(values, len(numbers)) for name, values in given.items()}
            rows = np.flatnonzero(~np.all(list(absent.values()), axis=0))
            if len(rows):
                told = {
                    c.name: _filled(c, given[c.name], absent[c.name])[rows]
                    for c in self.features.columns
                }
                features[rows] = self.features.apply(told)
        return np.concatenate([numbers[:, None].astype(np.float32), features], axis=1)


def _absent(values: Any, n: int) -> npt.NDArray[np.bool_]:
    if values is None:
        return np.ones(n, np.bool_)
    return np.array([v is None or v != v for v in values], np.bool_)


def _filled(column: Column, values: Any, absent: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    if values is None:
        values = [None] * len(absent)
    if column.kind == "number":
        return np.asarray(values, np.float64)
    return np.array(["" if no else str(v) for v, no in zip(values, absent, strict=True)], np.str_)


@dataclass(frozen=True, kw_only=True)
class InteractionFit:
    """See `fitted.Fitted`."""

    user: Side
    item: Side
    ranking: bool
    target_mean: float
    target_deviation: float
    low: float
    high: float
    """Of the training ratings; an answer lies between them."""
    seen_ends: npt.NDArray[np.int64]
    """[users + 1] Where each user's items end in ``seen``, the unknown one's (none) first."""
    seen: npt.NDArray[np.int32]
    """Numbers of the items that each user has taken, user by user; of a ranking."""

    @property
    def columns(self) -> tuple[Column, ...]:
        sides = (self.user,) if self.ranking else (self.user, self.item)
        ids = [side.id for side in sides]
        return (*ids, *(c for side in sides if side.features for c in side.features.columns))

    @property
    def input_shape(self) -> tuple[int, ...]:
        width = 1 + self.user.table.shape[1]
        return (width if self.ranking else width + 1 + self.item.table.shape[1],)

    @property
    def facts(self) -> Mapping[str, Any]:
        catalog = Catalog(
            users=len(self.user.id.categories),
            items=len(self.item.id.categories),
            user_features=self.user.table.shape[1],
            item_features=self.item.table.shape[1],
            ranking=self.ranking,
            item_table=self.item.table,
        )
        return {"catalog": catalog}

    def apply(self, columns: Mapping[str, Any]) -> Floats:
        """[n, *input_shape], see `Catalog`."""
        x = self.user.apply(columns)
        return x if self.ranking else np.concatenate([x, self.item.apply(columns)], axis=1)

    def restore(
        self, outputs: npt.NDArray[np.floating], x: npt.NDArray[Any]
    ) -> npt.NDArray[np.floating]:
        """Ratings within their range; or scores, minus infinity for what a user has had."""
        if not self.ranking:
            values = outputs.astype(np.float64) * self.target_deviation + self.target_mean
            return np.clip(values, self.low, self.high)
        scores = outputs.copy()
        for row, user in enumerate(x[:, 0]):
            if user > 0:  # NaN for a row of infinite numbers
                scores[row, self.seen_of(int(user)) - 1] = -np.inf
        return scores

    def seen_of(self, user: int) -> npt.NDArray[np.int32]:
        """Numbers of the items a user has taken."""
        first = self.seen_ends[user - 1] if user else 0
        return self.seen[first : self.seen_ends[user]]

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "kind": "interactions",
            "ranking": self.ranking,
            "target": {
                "mean": self.target_mean,
                "deviation": self.target_deviation,
                "low": self.low,
                "high": self.high,
            },
        }
        tensors: dict[str, npt.NDArray[Any]] = {"seen": self.seen, "seen_ends": self.seen_ends}
        for name, side in (("user", self.user), ("item", self.item)):
            tensors[f"{name}.table"] = side.table
            value[name] = {"id": asdict(side.id), "features": None}
            if side.features is not None:
                value[name]["features"], own = side.features.describe()
                tensors |= {f"{name}.fitted.{key}": tensor for key, tensor in own.items()}
        (folder / "preprocess.json").write_text(json.dumps(value, indent=1))
        save_file(tensors, folder / "preprocess.safetensors")

    @staticmethod
    def load(folder: Path) -> InteractionFit:
        """Read what `save` wrote."""
        value = json.loads((folder / "preprocess.json").read_text())
        tensors = load_file(folder / "preprocess.safetensors")
        target = value["target"]
        return InteractionFit(
            user=_side("user", value["user"], tensors),
            item=_side("item", value["item"], tensors),
            ranking=value["ranking"],
            target_mean=target["mean"],
            target_deviation=target["deviation"],
            low=target["low"],
            high=target["high"],
            seen_ends=tensors["seen_ends"],
            seen=tensors["seen"],
        )


def _side(name: str, value: dict[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Side:
    prefix = f"{name}.fitted."
    features = None
    if value["features"] is not None:
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        features = preprocess.described(value["features"], own)
    return Side(id=Column.from_json(value["id"]), features=features, table=tensors[f"{name}.table"])


def fit(
    train: Interactions,
    *,
    user: str,
    item: str,
    user_features: tuple[str, ...],
    item_features: tuple[str, ...],
    ranking: bool,
    had: list[tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]],
) -> InteractionFit:
    """Ids, features and the rating's scale of the training interactions.

    Args:
        had: (users, items) of what a ranking leaves out of its answers.
    """
    users = _fit_side(user, train.user, user_features, train)
    items = _fit_side(item, train.item, item_features, train)
    seen: list[set[int]] = [set() for _ in range(len(users.id.categories) + 1)]
    for some_users, some_items in had if ranking else []:
        for one, other in zip(some_users, some_items, strict=True):
            number, taken = users.numbers.get(one, 0), items.numbers.get(other, 0)
            if number and taken:
                seen[number].add(taken)
    deviation = float(spread.deviation(train.rating))
    return InteractionFit(
        user=users,
        item=items,
        ranking=ranking,
        target_mean=float(train.rating.mean()),
        target_deviation=deviation or 1.0,
        low=float(train.rating.min()),
        high=float(train.rating.max()),
        seen_ends=np.cumsum([len(taken) for taken in seen], dtype=np.int64),
        seen=np.array([one for taken in seen for one in sorted(taken)], np.int32),
    )


def _fit_side(
    name: str, ids: npt.NDArray[np.object_], features: tuple[str, ...], train: Interactions
) -> Side:
    known, first = np.unique(ids.astype(np.str_), return_index=True)
    column = Column(name=name, kind="id", categories=tuple(str(id_) for id_ in known))
    table = np.zeros((len(known) + 1, 0), np.float32)
    if not features:
        return Side(id=column, features=None, table=table)
    kinds = tuple(c for c in train.kinds if c.name in features)
    values = {c.name: train.features[c.name][first] for c in kinds}
    fitted = preprocess.fit_table(kinds, values, TablePreprocess(missing="median"), Own())
    encoded = fitted.apply(values)
    zeros = np.zeros((1, encoded.shape[1]), np.float32)
    fitted = replace(fitted, columns=tuple(replace(c, lookup=True) for c in fitted.columns))
    return Side(id=column, features=fitted, table=np.concatenate([zeros, encoded]))
