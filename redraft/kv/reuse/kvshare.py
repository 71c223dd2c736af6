"""Reuses spans that other requests of a tenant have too, wherever they stand, and repairs those that are wrong and attended.

Huan Yang, Renji Zhang, Mingzhe Huang, Weijun Wang, Yin Tang, Yuanchun Li, Yunxin Liu, Deyu Zhang: KVShare: An LLM Service System with
Efficient and Effective Multi-Tenant KV Cache Reuse, 2025, arXiv 2503.16525.

1. Cut prompts where their own tokens say so. Attach the cache of spans that another text has, keys rotated to their new positions.
2. Run all attached rows through the first `check` + 1 layers. The deviation of a row is the distance of its keys in layer `check` from
   the attached ones, plus that of its values, each in parts of the mean length.
3. The importance of a row is the attention that the `window` rows after the last span give to it.
4. Score = deviation x importance. Rows above the mean by `spread` standard deviations run again through all layers, at most `ratio` of
   all, and so do the rows after them that ran already.
5. While the first `later` new tokens are generated: after every `every` of them, rows whose score with the attention of these tokens is
   above the bound of step 4 run again.

Differs: text with reused spans is not cached for others, so a prompt of which less than `least` is found is computed; cuts, score and
bounds follow the paper's words, its formulas are not known here; importance is the mean over all layers; the scheduler does not prefer
requests with many hits; tenants do not share.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.core.tree import F64, I32
from redraft.core.view import Watch
from redraft.kv.reuse.blend import differences, fit, largest
from redraft.kv.reuse.chunks import spans_of, texts_of
from redraft.kv.reuse.reuse import AtOnce, Later, Pass, Repair, Seen, Span, Spliced
from redraft.kv.spans import SpanIndex
from redraft.options import Options, number

ATTENTION = (Watch("mass", each=True),)


@dataclass(frozen=True)
class KVShare(Options):
    """ratio: the part of the attached rows that run again before the first new token, at most; spread: standard deviations between the
    mean score and the bound; check: the layer that is compared, from 0 on; window: rows whose attention counts; later: the first new
    tokens, after which rows may run again; every: new tokens between two such decisions; least: the part of a prompt without segments,
    beyond what the prefix cache has, that must be found."""

    ratio: float = number(0.15, ge=0, le=1)
    spread: float = 1.0
    check: int = number(1, ge=0)
    window: int = number(16, ge=1, le=256)
    later: int = number(8, ge=0, le=1024)
    every: int = number(4, ge=1)
    least: float = number(0.5, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "KVShare",
        "Yang et al., KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse, 2025, arXiv 2503.16525",
        Guarantee.LOSSY,
        needs="a model with rotary positions",
        deviates="spans and scores are reconstructed; attention of all layers; requests with hits are not preferred; tenants do not share",
        summary="Keeps the cache of text seen anywhere before; for agents",
    )
    needs: ClassVar[str] = ""

    def open(self, runner: Any) -> Sharing:
        fit("kvshare", runner, self.check)
        return Sharing(self, SpanIndex.of(runner.memory.paged.table.prefix))


class Sharing(AtOnce):
    """The opened method. It keeps nothing of a text: the index knows what is published."""

    def __init__(self, method: KVShare, index: SpanIndex) -> None:
        self.method, self.index = method, index

    @property
    def later(self) -> bool:
        return self.method.later > 0

    @property
    def after(self) -> int:
        return self.method.window

    def texts(self, request: Request) -> list[list[int]]:
        return texts_of(request) if request.chunks else []

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        if request.chunks:
            return spans_of(request)
        found = self.index.find(request.prompt, request.salt, stored)  # 1.
        if sum(one.length for one in found) < self.method.least * (len(request.prompt) - stored):
            return []
        return [Span(*one[:3], one.first == one.at and one.source[: one.at] == request.prompt[: one.at], one.source) for one in found]

    def repair(self, text: Spliced) -> Repair:
        method, most = self.method, int(self.method.ratio * len(text.rows))
        if not most:
            return
        away = yield from differences(text, method.check)  # 2.
        deviation, wrong = np.sqrt(away.keys) + np.sqrt(away.values), np.ones(len(text.rows), bool)
        first, end, prompt = int(text.rows[0]), int(text.rows[-1]) + 1, len(text.request.prompt) - 1
        at = min(end + method.window, prompt)
        yield Later(at)
        seen = yield Pass(np.arange(max(first, at - method.window), at, dtype=np.int32), watch=ATTENTION)  # 3.
        score = deviation * _importance(seen, text.rows)
        bound = float(score.mean() + method.spread * score.std())  # 4.
        if len(chosen := _above(bound, score, most)):
            yield Pass(np.concatenate([text.rows[chosen], np.arange(end, at, dtype=np.int32)]))
        for new in range(method.every, method.later + 1, method.every):  # 5.
            wrong[chosen] = False
            seen = yield Later(prompt + new, ATTENTION)
            chosen = _above(bound, np.where(wrong, deviation * _importance(seen, text.rows), -np.inf), most)
            yield Pass(text.rows[chosen])


def _above(bound: float, scores: F64, most: int) -> I32:
    """The places of scores above a bound, ascending: of more than `most`, the largest."""
    return largest(scores, min(most, int((scores > bound).sum())))


def _importance(seen: Seen | None, rows: I32) -> F64:
    """The attention that a row gives to each of `rows`, on average over layers, kv heads, and the rows that were seen."""
    assert seen is not None
    own = seen[0][..., rows].astype(np.float64)
    found: F64 = np.add.reduce([row.mean((0, 1)) for row in own]) / len(own)
    return found
