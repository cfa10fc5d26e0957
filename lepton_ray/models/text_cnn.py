"""A convolutional network over the words of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TextCnn(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        classes: int,
        embedding: int,
        width: int,
        windows: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(embedding, width, window, padding=window // 2) for window in windows
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width * len(windows), classes)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes] from the numbers of words [n, length], 0 behind a text's end."""
        vectors = self.dropout(self.embed(words)).transpose(1, 2)
        # Not max(): its gradient goes back by index, which has no deterministic kernel on a GPU.
        best = [convolution(vectors).amax(2).relu() for convolution in self.convolutions]
        logits: Tensor = self.head(self.dropout(torch.cat(best, 1)))
        return logits


def text_cnn(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    embedding: int = 64,
    width: int = 64,
    windows: Sequence[int] = (2, 3, 4),
    dropout: float = 0.5,
) -> nn.Module:
    """An embedding, ``width`` convolutions over each window of words, their largest answer over the
    text, and a linear layer (Kim, "Convolutional Neural Networks for Sentence Classification",
    2014); dropout on the embedding and before the last layer.

    Args:
        vocabulary: of the words' numbers; given by the data.
        windows: numbers of words.

    Raises:
        ValueError: for no window, or one of less than a word.
    """
    if not windows or min(windows) < 1:
        raise ValueError(f"windows must list word counts from 1, but got {list(windows)}")
    return TextCnn(vocabulary, classes, embedding, width, windows, dropout)
