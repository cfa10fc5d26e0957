"""Texts as numbers of words, by a tokenizer fitted on the training texts or a pretrained model's.

A fitted one's word is a run of letters and digits, or of other marks, in lower case after Unicode's
NFKC; the tokenizer is one of Hugging Face's ``tokenizers``, which says all of this in its own JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

Numbers = npt.NDArray[np.int32]

PADDING, UNKNOWN = "[PAD]", "[UNK]"  # numbers 0 and 1


def fit(texts: Sequence[str], vocabulary: int, longest: int) -> Tokenizer:
    """A tokenizer that knows the most frequent words; of equally frequent ones, the first by code
    point.

    Args:
        vocabulary: words it knows at most.
        longest: words it cuts longer texts to; no more than the longest text has.
    """
    trained = _splitter(models.WordLevel(unk_token=UNKNOWN))
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocabulary + 2, special_tokens=[PADDING, UNKNOWN], show_progress=False
    )
    trained.train_from_iterator(texts, trainer, len(texts))
    # Anew from the words alone: a trained one would take "[UNK]" spelled out in a text for the
    # unknown word, and a text could pad itself.
    tokenizer = _splitter(models.WordLevel(trained.get_vocab(), UNKNOWN))
    most = max(1, min(longest, int(counts(tokenizer, texts).max())))
    tokenizer.enable_truncation(most)
    tokenizer.enable_padding(length=most, pad_id=0, pad_token=PADDING)
    return tokenizer


def adopt(tokenizer: Tokenizer, padding: int, texts: Sequence[str], longest: int) -> Tokenizer:
    """A pretrained model's own tokenizer, cutting and filling up as one of `fit` does.

    Args:
        padding: number of its token behind a text's end.
    """
    own = Tokenizer.from_str(tokenizer.to_str())
    most = max(1, min(longest, int(counts(own, texts).max())))
    own.enable_truncation(most)
    token = own.id_to_token(padding) or PADDING
    own.enable_padding(length=most, pad_id=padding, pad_token=token)
    return own


def unknown(tokenizer: Tokenizer) -> int | None:
    """The number of the word that stands for all others; some know every text and have none."""
    token = getattr(tokenizer.model, "unk_token", None)
    number = None if token is None else tokenizer.token_to_id(token)
    return number or None  # 0 is the end of a text


def marks(tokenizer: Tokenizer) -> list[int]:
    """Numbers of `encode` that are no part of a text: its end, and what stands around each text."""
    return sorted(set(encode(tokenizer, [""])[0].tolist()))


def word(tokenizer: Tokenizer, number: int) -> str:
    """What a number of `encode` stands for."""
    return str(tokenizer.id_to_token(0 if number == _padding(tokenizer) else number))


def _padding(tokenizer: Tokenizer) -> int:
    assert tokenizer.padding is not None
    return int(tokenizer.padding["pad_id"])


def _splitter(model: models.WordLevel) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Numbers:
    """[n, length] The number of each word, 0 behind a text's end.

    Where a pretrained model's padding is not 0, it and token 0 change places; the model changes
    them back.
    """
    encodings = tokenizer.encode_batch_fast(list(texts))
    numbers = np.array([e.ids for e in encodings], np.int32).reshape(len(texts), length(tokenizer))
    if padding := _padding(tokenizer):
        there = np.array([e.attention_mask for e in encodings], np.bool_).reshape(numbers.shape)
        numbers[numbers == 0] = padding
        numbers[~there] = 0
    return numbers


def length(tokenizer: Tokenizer) -> int:
    """Words of a text, with what fills it up."""
    assert tokenizer.truncation is not None
    return int(tokenizer.truncation["max_length"])


def counts(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """[n] How many words each text has, and marks around them, before any is cut."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    return np.array([len(e) for e in whole.encode_batch_fast(list(texts))], np.int64)


def problem(text: object, longest: int) -> str:
    """The rule a text breaks; empty for one that can be taken."""
    if not isinstance(text, str):
        return "must be a text"
    if len(text) > longest:
        return f"a text has at most {longest:,} characters (this has {len(text):,})"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
        return "must be a text of valid Unicode"
    return ""
