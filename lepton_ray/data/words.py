"""Texts as numbers of words, by a tokenizer fitted on the training texts.

A word is a run of letters and digits, or of other marks, in lower case after Unicode's NFKC; the
tokenizer is one of Hugging Face's ``tokenizers``, which says all of this in its own JSON.
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


def _splitter(model: models.WordLevel) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Numbers:
    """[n, length] The number of each word; 1 for an unknown word, 0 behind a text's end."""
    encodings = tokenizer.encode_batch_fast(list(texts))
    return np.array([e.ids for e in encodings], np.int32).reshape(len(texts), length(tokenizer))


def length(tokenizer: Tokenizer) -> int:
    """Words of a text, with what fills it up."""
    assert tokenizer.truncation is not None
    return int(tokenizer.truncation["max_length"])


def counts(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """[n] How many words each text has, before any is cut."""
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
