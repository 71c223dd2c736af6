"""Joins the caches of chunks that were computed apart, and computes the rows again whose values differ most from computed ones.

Jiayi Yao, Hanchen Li, Yuhan Liu, Siddhant Ray, Yihua Cheng, Qizheng Zhang, Kuntai Du, Shan Lu, Junchen Jiang: CacheBlend: Fast Large
Language Model Serving for RAG with Cached Knowledge Fusion, 2024, arXiv 2405.16444.

1. Attach the cache of each chunk at its place, keys rotated to their new positions.
2. Run all attached rows through the first `check` + 1 layers. The difference of a row is the squared distance of its keys and values in
   layer `check` from the attached ones, over all kv heads, in parts of the mean square of keys and of values.
3. Run the `ratio` of the rows with the largest differences through all layers. Each sees the rows before it, repaired or not.
4. Compute the rows after the last chunk.

Differs: the rows of step 3 run through the first layers twice, which changes no bit; one set of rows serves all layers, instead of
sets that shrink from layer to layer; all caches are in memory, so nothing is loaded meanwhile. With `nearness`, a difference is divided
by (rows after it)^nearness, because the last rows of the context weigh most in what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.kv.reuse.blend import differences, fit, largest
from redraft.kv.reuse.chunks import spans_of, texts_of
from redraft.kv.reuse.reuse import AtOnce, Pass, Repair, Span, Spliced
from redraft.options import Options, number


@dataclass(frozen=True)
class CacheBlend(AtOnce, Options):
    """ratio: the part of the attached rows that run again; check: the layer whose keys and values are compared, from 0 on; nearness: how
    much rows near the end are preferred, 0 as in the paper, 0.5 is a good choice."""

    ratio: float = number(0.15, ge=0, le=1)
    check: int = number(1, ge=0)
    nearness: float = number(0.0, ge=0, le=4)

    card: ClassVar[Card] = Card(
        "CacheBlend",
        "Yao et al., CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion, 2024, arXiv 2405.16444",
        Guarantee.LOSSY,
        needs="a prompt of segments; a model with rotary positions",
        deviates="one set of rows for all layers; caches are in memory",
        summary="Chunks in any order keep their cache; some rows run again",
    )

    needs: ClassVar[str] = "segments"

    def open(self, runner: Any) -> Self:
        fit("cacheblend", runner, self.check)
        return self

    def texts(self, request: Request) -> list[list[int]]:
        return texts_of(request)

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        return spans_of(request)  # 1.

    def repair(self, text: Spliced) -> Repair:
        count, rows = int(self.ratio * len(text.rows)), len(text.rows)
        if 0 < count < rows:
            away = yield from differences(text, self.check)  # 2.
            score = (away.keys + away.values) / (rows - np.arange(rows)) ** self.nearness
            yield Pass(text.rows[largest(score, count)])  # 3.
        elif count:
            yield Pass(text.rows)
