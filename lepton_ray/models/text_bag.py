"""A bag of words and word n-grams: what measures best on small sets of texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

FACTOR, MODULUS = 1_000_003, (1 << 31) - 1  # of the hash; below 2**62 in between, so never negative


class TextBag(nn.Module):
    def __init__(
        self, vocabulary: int, classes: int, width: int, ngrams: int, buckets: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary, self.ngrams, self.buckets = vocabulary, ngrams, buckets
        self.dropout = dropout
        rows = vocabulary + (buckets if ngrams > 1 else 0)
        self.embed = nn.Embedding(rows, width or classes)
        self.head = nn.Linear(width, classes) if width else nn.Identity()
        nn.init.normal_(self.embed.weight, std=0.1 if width else 0.0)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes] from the numbers of words [n, length], 0 behind a text's end."""
        words = words.long()
        there = words != 0
        numbers, real, rolling = [words], [there], words
        for size in range(2, self.ngrams + 1):
            rolling = (rolling[:, :-1] * FACTOR + words[:, size - 1 :]) % MODULUS
            numbers.append(self.vocabulary + rolling % self.buckets)
            real.append(there[:, size - 1 :])
        present = torch.cat(real, 1).float()
        count = present.sum(1, keepdim=True).clamp(min=1.0)
        # A whole word or n-gram is dropped, not some numbers of it: the rest must do without.
        kept = functional.dropout(present, self.dropout, self.training) / count.sqrt()
        vectors = self.embed(torch.cat(numbers, 1))
        logits: Tensor = self.head((vectors * kept.unsqueeze(2)).sum(1))
        return logits


def text_bag(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    width: int = 32,
    ngrams: int = 1,
    buckets: int = 1 << 18,
    dropout: float = 0.5,
) -> nn.Module:
    """The sum of the vectors of a text's words, and of its runs of up to ``ngrams`` words, over the
    root of their number; then a linear layer.

    Args:
        vocabulary: of the words' numbers; given by the data.
        width: of a vector; 0 gives each n-gram one score a class, which is a linear model.
        buckets: vectors that all n-grams of two and more words share by hash (as in Weinberger et
            al., "Feature Hashing for Large Scale Multitask Learning", 2009).
        dropout: share of words and n-grams left out of a text in training.

    Raises:
        ValueError: when texts are shorter than an n-gram.
    """
    if not 1 <= ngrams <= input_shape[0]:
        raise ValueError(
            f"ngrams must be from 1 to the {input_shape[0]} words of a text, but got {ngrams}"
        )
    return TextBag(vocabulary, classes, width, ngrams, buckets, dropout)
