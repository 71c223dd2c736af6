"""Keeps the whole cache of the heads that retrieve; all others keep the first and newest tokens, and the mean of the rest in one slot.

Hanlin Tang, Yang Lin, Jing Lin, Qingsen Han, Shikuan Hong, Yiwu Yao, Gongyi Wang: RazorAttention: Efficient KV Cache Compression Through
Retrieval Heads, 2024, arXiv 2407.15891.

1. Once for each model: score the kv heads (kv/eviction/retrieval_heads.py). The best by echo and by induction retrieve.
2. At the end of the given text, and then every `every` tokens, the other heads keep the first tokens and the newest max(recent, share * N)
   of N.
3. One slot has the mean of the dropped keys and the mean of the dropped values. It stands for as many tokens: the logarithm of their
   number is added to its score.

Differs: whole pages are dropped, so up to a page more of the first tokens stays; the mean is rounded to the dtype of the cache whenever
tokens join it; the newest are 256 or a fifth, not 4,000 or a fifth, because our contexts are shorter than the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import NEVER, UNLIMITED, Lanes, Onset, Sequence
from redraft.core.tree import F32
from redraft.kv.eviction.eviction import OpenEviction, StatelessEviction
from redraft.kv.eviction.retrieval_heads import HeadProfile, calibrate, opened
from redraft.kv.slots import Held, Kept, Merged
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner


class Razor(StatelessEviction):
    """The opened policy. whole: bool[L, K], the heads that keep all; first: the slots before those that are dropped, the last of which has
    the mean."""

    lanes = Lanes.PER_HEAD

    def __init__(self, whole: NDArray[np.bool_], sinks: int, recent: int, share: float, every: int, mean: bool, page: int) -> None:
        self.whole, self.recent, self.share, self.every, self.page, self.merges = whole, recent, share, every, page, mean
        self.first = (sinks // page + 1) * page if mean else -(-sinks // page) * page

    def sync_point(self, seq: Sequence) -> int:
        context = seq.context
        return context if seq.stored < context else context + ((seq.stored - context) // self.every + 1) * self.every

    def gone(self, stored: int) -> int:
        """The end of the tokens that were dropped when `stored` are in the cache, or `first`."""
        newest = max(self.recent, ceil(self.share * stored))  # 2.
        return max(self.first, (stored - newest) // self.page * self.page)

    def onset(self, context: int) -> Onset:
        if self.whole.all() or (at := self._begins(context)) >= UNLIMITED:
            return NEVER
        few = self.first + at - self.gone(at)
        return Onset(at, at, slots=ceil(at + (few - at) * (1 - self.whole.mean())))

    def _begins(self, context: int) -> int:
        """The first sync point at which something is dropped."""
        least = self.first + self.page
        need = max(least + self.recent, floor(least / (1 - self.share)) if self.share < 1 else UNLIMITED)
        at = context + max(0, -(-(need - context) // self.every)) * self.every
        while at < UNLIMITED and self.gone(at) <= self.first:  # share * N is rounded up
            at += self.every
        return at

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        if seq.stored < seq.context or (seq.stored - seq.context) % self.every or self.whole.all():
            return None
        gone, lanes = self.gone(seq.stored), held.positions()
        windowed = np.flatnonzero(~self.whole).tolist()
        lane = lanes[windowed[0]]  # all of them have the same positions
        if gone <= self.first or int(lane[self.first]) >= gone:
            return None
        kept, end = np.flatnonzero((lane < self.first) | (lane >= gone)).astype(np.int32), int(np.searchsorted(lane, gone))
        slots = [np.arange(len(own), dtype=np.int32) if stays else kept for own, stays in zip(lanes, self.whole.ravel(), strict=True)]
        if not self.merges:
            return Kept(slots)
        before = int(lane[self.first]) - self.first + 1  # tokens that the slot of the mean stands for
        keys, values = (np.stack(part) for part in zip(*(self._mean(held, i, end, before) for i in windowed), strict=True))
        count, place = len(windowed), self.first - 1
        total = np.full(count, gone - place, np.int32)
        return Kept(slots, Merged(np.array(windowed, np.int32), np.full(count, place, np.int32), keys, values, total))

    def _mean(self, held: Held, lane: int, end: int, before: int) -> tuple[F32, F32]:
        """The means of keys and values of the slot of the mean, for `before` tokens, and of the slots after it up to `end`."""
        weights = np.ones(end - self.first + 1)
        weights[0] = before
        parts = held.read(lane, self.first - 1, end)
        key, value = ((weights[:, None] * part[0]).sum(0) / weights.sum() for part in parts)  # 3. one row after another
        return key.astype(np.float32), value.astype(np.float32)


@dataclass(frozen=True)
class RazorAttention(Options):
    """echo, induction: the shares of kv heads that keep all tokens, the best by each score; sinks: the number of first tokens that stay in
    the other heads; recent, share: these keep the newest `recent` tokens, or this share of all if that is more; budget: above 0, the part
    of the cache that stays, half of it at most in heads that keep all, in place of `share`; every: tokens between two evictions; mean: 1
    keeps the mean of the rest, 0 drops it; profile: the file of a calibration, None for the place where `redraft
    calibrate` writes it."""

    echo: float = number(0.01, ge=0, le=1)
    induction: float = number(0.14, ge=0, le=1)
    sinks: int = number(4, ge=0)
    recent: int = number(256, ge=1)
    share: float = number(0.2, ge=0, le=1)
    budget: float = number(0.0, ge=0, le=1)
    every: int = number(128, ge=1)
    mean: int = number(1, ge=0, le=1)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "RazorAttention",
        "Tang, Lin, Lin, Han, Hong, Yao, Wang, RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, "
        "2024, arXiv 2407.15891",
        Guarantee.LOSSY,
        needs="scores of the model's heads, once: redraft calibrate --method razor",
        deviates="whole pages are dropped; 256 newest tokens at least, not 4,000; the mean is rounded whenever it changes",
        budget="budget={part},recent=32",
        summary="Heads that retrieve keep all; long prompts",
    )
    reads_texts: ClassVar[bool] = False

    def open(self, runner: Runner) -> OpenEviction:
        """InvalidInput if there is no profile of the model; CheckpointError if it is damaged."""
        profile, page = opened(runner, self.profile, "razor"), runner.memory.paged.table.page
        whole, share = profile.retrieving(self.echo, self.induction), self.share
        if self.budget:
            scale = 1.0 if self.budget == 1 else min(1.0, self.budget / 2 / max(float(whole.mean()), 1e-9))
            whole = profile.retrieving(self.echo * scale, self.induction * scale) if scale < 1 else whole
            part = float(whole.mean())
            share = max(0.0, (self.budget - part) / (1 - part)) if part < 1 else 1.0
        return Razor(whole, self.sinks, self.recent, share, self.every, bool(self.mean), page)

    @staticmethod
    def calibrate(runner: Runner, texts: object = (), samples: int = 0) -> HeadProfile:
        """Scores of the heads on random tokens; texts are not needed."""
        return calibrate(runner)
