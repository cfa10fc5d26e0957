"""Two towers: users and items as vectors, from ids and features, whose product is the score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lepton_ray.data.interactions.fit import Catalog
from lepton_ray.models.matrix_factorization import Factors


class Tower(nn.Module):
    """The vector and the bias of an id with its features."""

    def __init__(
        self, ids: int, features: int, width: int, hidden: int, dropout: float, unknown: float
    ) -> None:
        super().__init__()
        self.unknown = unknown
        self.embed = nn.Embedding(ids + 1, width)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.Linear(width + features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width + 1),
        )

    def forward(self, numbers: Tensor, features: Tensor) -> Tensor:
        """[..., width + 1] from numbers [...] and features [..., n]"""
        if self.training and self.unknown > 0:
            numbers = numbers * (torch.rand(numbers.shape, device=numbers.device) >= self.unknown)
        return self.layers(torch.cat([self.embed(numbers), features], -1))  # type: ignore[no-any-return]


def two_tower(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    catalog: Catalog,
    width: int = 32,
    hidden: int = 64,
    dropout: float = 0.2,
    unknown: float = 0.05,
) -> nn.Module:
    """A network each for users and items, over the id's vector and the features; the score is the
    product of what they give, plus what each gives alone.

    Args:
        catalog: what the data say of users and items.
        width: of the vectors.
        hidden: units of each tower's layer.
        unknown: share of ids taken for one never seen in training, so that the vector of such, and
            the features beside it, are learnt.
    """
    return Factors(
        catalog,
        Tower(catalog.users, catalog.user_features, width, hidden, dropout, unknown),
        Tower(catalog.items, catalog.item_features, width, hidden, dropout, unknown),
        dropout=0.0,
        scale=width**-0.5,
    )
