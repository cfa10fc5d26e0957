"""A small transformer encoder over the words of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FAR = -1e9  # as a logit of attention: no weight, and no NaN where a text has no word


class Block(nn.Module):
    """Attention, then a layer for each word alone; each on normalized input, and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layer = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.layer = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """[n, length, width] from the same; ``hidden`` [n, 1, 1, length] is added to the logits."""
        n, length, width = x.shape
        split = self.query_key_value(self.before_attention(x)).view(n, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels' backward is not deterministic on every GPU.
        logits = query @ key.transpose(2, 3) / math.sqrt(width // self.heads) + hidden
        mixed = (logits.softmax(3) @ value).transpose(1, 2).reshape(n, length, width)
        x = x + self.dropout(self.attended(mixed))
        changed: Tensor = x + self.dropout(self.layer(self.before_layer(x)))
        return changed


class TextTransformer(nn.Module):
    def __init__(
        self,
        length: int,
        vocabulary: int,
        classes: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes] from the numbers of words [n, length], 0 behind a text's end."""
        there = (words != 0).float()
        hidden = (1.0 - there)[:, None, None, :] * FAR
        x = self.dropout(self.embed(words) + self.positions)
        for block in self.blocks:
            x = block(x, hidden)
        weights = there / there.sum(1, keepdim=True).clamp(min=1.0)
        logits: Tensor = self.head((self.norm(x) * weights.unsqueeze(2)).sum(1))
        return logits


def text_transformer(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.2,
) -> nn.Module:
    """An encoder with learned positions and normalization before each part (Xiong et al., "On Layer
    Normalization in the Transformer Architecture", 2020), the mean over a text's words, and a
    linear layer.

    Args:
        vocabulary: of the words' numbers; given by the data.
        width: of a word's vector.
        heads: of attention; they share the width.

    Raises:
        ValueError: when the heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide width {width}, but got {heads}")
    return TextTransformer(input_shape[0], vocabulary, classes, width, layers, heads, dropout)
