"""Matrix factorization: a vector and a bias for each user and each item."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_ray.data.interactions.fit import Catalog


class Factors(nn.Module):
    """Scores as the product of a user's and an item's vector, plus their biases.

    Args:
        user, item: (numbers [...], features [..., n]) -> [..., width + 1], the bias last.
        dropout: share of the product's numbers left out in training.
        scale: of the product.
    """

    def __init__(
        self, catalog: Catalog, user: nn.Module, item: nn.Module, *, dropout: float, scale: float
    ) -> None:
        super().__init__()
        self.user, self.item = user, item
        self.dropout, self.scale = dropout, scale
        self.split = 1 + catalog.user_features
        self.ranking = catalog.ranking
        if catalog.ranking:
            self.register_buffer("item_table", torch.from_numpy(catalog.item_table.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1] scores of a user and an item each, or [n, items] of candidates or of all; what a
        sample holds is told at `Catalog`."""
        who, what = x[:, : self.split], x[:, self.split :]
        user = self.user(who[:, 0].long(), who[:, 1:])
        if not self.ranking:
            item = self.item(what[:, 0].long(), what[:, 1:]).unsqueeze(1)
            return self._scores(user, item)
        table: Tensor = self.item_table  # type: ignore[assignment]
        if what.shape[1]:
            candidates = what.long()
            return self._scores(user, self.item(candidates, table[candidates]))
        everything = torch.arange(1, len(table), device=x.device)
        all_ = self.item(everything, table[1:])
        product = functional.linear(user[:, :-1], all_[:, :-1])
        scores: Tensor = product * self.scale + user[:, -1:] + all_[:, -1]
        return scores

    def _scores(self, user: Tensor, item: Tensor) -> Tensor:
        """[n, items] from [n, width + 1] and [n, items, width + 1]"""
        left = functional.dropout(user[:, None, :-1], self.dropout, self.training)
        right = functional.dropout(item[..., :-1], self.dropout, self.training)
        scores: Tensor = (left * right).sum(-1) * self.scale + user[:, -1:] + item[..., -1]
        return scores


class Embedding(nn.Module):
    """A vector and a bias of an id, plus what its features add."""

    def __init__(self, ids: int, features: int, width: int, unknown: float) -> None:
        super().__init__()
        self.unknown = unknown
        self.embed = nn.Embedding(ids + 1, width + 1)
        nn.init.normal_(self.embed.weight, std=0.05)
        nn.init.zeros_(self.embed.weight[:, -1])
        self.features = nn.Linear(features, width + 1, bias=False) if features else None
        if self.features is not None:
            nn.init.normal_(self.features.weight, std=0.02)

    def forward(self, numbers: Tensor, features: Tensor) -> Tensor:
        """[..., width + 1] from numbers [...] and features [..., n]"""
        if self.training and self.unknown > 0:
            numbers = numbers * (torch.rand(numbers.shape, device=numbers.device) >= self.unknown)
        vectors: Tensor = self.embed(numbers)
        return vectors if self.features is None else vectors + self.features(features)


def matrix_factorization(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    catalog: Catalog,
    width: int = 64,
    dropout: float = 0.4,
    unknown: float = 0.02,
) -> nn.Module:
    """The product of a user's and an item's vector, plus a bias of each (Koren, Bell and Volinsky,
    "Matrix Factorization Techniques for Recommender Systems", 2009); features add to both.

    Args:
        catalog: what the data say of users and items.
        width: of the vectors.
        dropout: share of the vectors' numbers left out in training; what keeps a small set from
            being learnt by heart.
        unknown: share of ids taken for one never seen in training, so that the vector of such is
            learnt.
    """
    return Factors(
        catalog,
        Embedding(catalog.users, catalog.user_features, width, unknown),
        Embedding(catalog.items, catalog.item_features, width, unknown),
        dropout=dropout,
        scale=1.0,
    )
