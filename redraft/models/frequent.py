"""The most frequent tokens of a text, for drafters that draft no others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from redraft.core.tree import I64
from redraft.models.tokenizer import Tokenizer

ALWAYS = "\n0123456789"


def frequent(tokens: ArrayLike, count: int, vocab: int) -> I64:
    """i64[min(count, vocab)]: the most frequent of 0..vocab-1, ties by id."""
    return np.argsort(-np.bincount(np.asarray(tokens, np.int64), minlength=vocab)[:vocab], kind="stable")[:count]


def kept(tokens: ArrayLike, count: int, tokenizer: Tokenizer, eos: Iterable[int], vocab: int) -> I64:
    """i64, ascending: the `count` most frequent of 0..vocab-1, ends of text, special tokens, newline and digits."""
    always = {*eos, *tokenizer.special_ids}
    always.update(token for one in ALWAYS for token in tokenizer.encode(one, special=False))
    return np.union1d(frequent(tokens, count, vocab), [token for token in always if token < vocab]).astype(np.int64)
