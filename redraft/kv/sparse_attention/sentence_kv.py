"""Reads the sentences whose mean key fits the query best.

Yuxuan Zhu, Ali Falahati, David H. Yang, Mohammad Mohammadi Amiri: SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV
Caching, 2025, arXiv 2504.00970.

1. Split the text at tokens that end a sentence or a line. A sentence of `longest` tokens ends there.
2. Each head keeps the mean key of every sentence.
3. A query reads the first `start` tokens, the `recent` newest ones, and the sentences with the largest products of query and mean key,
   until it reads `tokens` tokens. The last sentence is cut.
4. A generated sentence can be found as soon as it has ended.

Differs: the row's own query chooses, not the mean query of its sentence; a sentence can be found from the next multiple of 32 tokens on
and is read by all rows until then; the prompt is not thinned (an eviction policy beside this one does that, and means are then those of
the slots that are left); no offloading. In the paper a single line break does not end a sentence;
without this, facts between lines of code are lost with the lines around them. A model without a tokenizer has sentences of `longest`
tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.kv.slots import Held
from redraft.kv.sparse_attention.sparse_attention import NoSideData, StatefulRead
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import Tensor, cast, device, kth_largest, namespace, wide
from redraft.ops.backend import Products
from redraft.ops.format import PAGE, Arrays
from redraft.options import Options, number

METHOD = "sentencekv"
ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
CLOSING = " \t\n\"')]}\u201d\u2019\u00bb"  # may follow the end of a sentence in the same token


@dataclass(frozen=True)
class SentenceKV(Options):
    """tokens: the tokens that a query head reads; start: the number of first tokens that are always read; recent: that of the newest ones;
    longest: the most tokens of a sentence."""

    tokens: int = 1024
    start: int = number(32, ge=0)
    recent: int = number(32, ge=1)
    longest: int = number(64, ge=1)

    card: ClassVar[Card] = Card(
        "SentenceKV",
        "Zhu, Falahati, Yang, Mohammadi Amiri, SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching, 2025, "
        "arXiv 2504.00970",
        Guarantee.LOSSY,
        deviates="the row's own query chooses; new sentences wait for a multiple of 32 tokens; lines end too; no thinning, no offloading",
        summary="Reads the sentences that fit best; several questions",
        budget="tokens={tokens}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.start + max(self.recent, self.longest + PAGE) + 1
        if self.tokens < least:
            raise InvalidInput(
                f"{METHOD}:tokens={self.tokens}: must be {least} or more, room for the first {self.start} tokens, the newest, an unfinished"
                " sentence and a token to choose"
            )

    def open(self, runner: Any) -> Sentences:
        enders = frozenset[int]() if runner.source is None else ends(Tokenizer(runner.source), runner.spec.vocab)
        return Sentences(self, enders, len(runner.spec.attention), runner.spec.kv_heads)


def ends(tokenizer: Tokenizer, vocab: int) -> frozenset[int]:
    """The ids of the tokens that end a sentence."""
    words = ((token, tokenizer.bytes_of(token).decode(errors="replace")) for token in range(vocab))
    return frozenset(token for token, word in words if "\n" in word or word.rstrip(CLOSING).endswith(ENDS))


@dataclass(frozen=True, eq=False)
class Sentences(StatefulRead):
    """The opened method. enders: the ids of tokens that end a sentence; layers, heads: those with attention, and the kv heads of each."""

    options: SentenceKV
    enders: frozenset[int]
    layers: int
    heads: int

    name: ClassVar[str] = METHOD
    sync_every: ClassVar[int] = PAGE

    @property
    def dense_up_to(self) -> int:
        return self.options.tokens

    def begin(self, seq: Sequence) -> Reader:
        return Reader(self)

    def fork(self, state: Reader, seq: Sequence) -> Reader:
        return Reader(self, state.stored, state.owner, state.means)

    def border(self, state: Reader, seq: Sequence, held: Held, edited: bool) -> None:
        stored = seq.stored // PAGE * PAGE
        if edited or stored != state.stored:
            state.follow(seq.tokens[:stored], held, anew=edited)


@dataclass(eq=False)
class Reader(NoSideData):
    """The finished sentences of one text. stored: the number of tokens that were split; owner: i64[tokens], the sentence of each token
    up to the end of the last sentence; means: f32 [L, K, sentences, D]."""

    of: Sentences
    stored: int = 0
    owner: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    means: NDArray[np.float32] | None = None

    def follow(self, tokens: list[int], held: Held, anew: bool) -> None:
        """Splits the tokens behind the last sentence. anew: the means of all sentences are computed, because slots were evicted."""
        last = len(self.owner)
        first = 0 if last == 0 else int(self.owner[-1]) + 1
        sizes, begun = [], last
        for i in range(last, len(tokens)):  # 1.
            if tokens[i] in self.of.enders or i + 1 - begun == self.of.options.longest:
                sizes.append(i + 1 - begun)
                begun = i + 1
        self.stored, before = len(tokens), 0 if anew or self.means is None else first
        self.owner = np.concatenate([self.owner, np.repeat(np.arange(first, first + len(sizes)), sizes)])
        count = first + len(sizes)
        if before < count:
            made = np.concatenate([self._means(lane, slots, held, before, count) for lane, slots in enumerate(held.positions())])
            made = made.reshape(self.of.layers, self.of.heads, *made.shape[1:])
            self.means = made if not before or self.means is None else np.concatenate([self.means, made], 2)

    def _means(self, lane: int, positions: NDArray[np.int32], held: Held, first: int, count: int) -> NDArray[np.float32]:
        """f32 [heads, count - first, D]: the mean keys of these sentences in the slots of a lane, 0 where none is left."""  # 2.
        owner = self.owner[positions[positions < len(self.owner)]]
        ends = np.searchsorted(owner, np.arange(first, count + 1)).tolist()
        keys, _ = held.read(lane, ends[0], ends[-1])
        made = np.zeros((len(keys), count - first, keys.shape[-1]), np.float32)
        for i, (a, z) in enumerate(pairwise(one - ends[0] for one in ends)):
            if a < z:
                made[:, i] = keys[:, a:z].sum(1, dtype=np.float64) / (z - a)
        return made

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, G, R, n]"""
        options, end = self.of.options, len(self.owner)
        if self.means is None or not end:
            return seen[:, None]
        xp, (heads, group, rows, size) = namespace(q), q.shape
        means = xp.asarray(self.means[index], device=device(q))
        found = products(q.reshape(heads, group * rows, size), cast(means, wide(q.dtype))).reshape(heads, group, rows, -1)
        owner = xp.asarray(self.owner, device=device(q))[xp.clip(where, 0, end - 1)]  # [K, n]
        places = xp.broadcast_to(owner[:, None, None], (heads, group, rows, owner.shape[-1]))
        scores = xp.take_along_axis(found, places, axis=-1)
        near = at[:, None] - where[:, None] < options.recent  # [K, R, n]
        always = near | ((where < options.start) | (where >= end))[:, None]
        scores = xp.where(seen[:, None], xp.where(always[:, None], inf, scores), -inf)
        last = kth_largest(scores, min(options.tokens, scores.shape[-1]))  # 3.
        above, equal = scores > last, scores == last
        room = options.tokens - above.sum(-1)[..., None]  # of a sentence that is cut the first tokens
        read: Tensor = seen[:, None] & (above | (equal & (equal.cumsum(-1) <= room)))
        return read
