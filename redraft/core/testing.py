"""Constructors of sequences, work and page views, for doctests and tests of single parts."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from redraft.config import SamplingParams
from redraft.core.batch import PageView
from redraft.core.plan import Work
from redraft.core.sequence import Lanes, Request, Sequence


def sequence(tokens: Iterable[int], *, stored: int = 0, prompt_len: int | None = None, **params: Any) -> Sequence:
    """A sequence that belongs to no engine. `params` are fields of SamplingParams."""
    tokens = list(tokens)
    length = len(tokens) if prompt_len is None else prompt_len
    request = Request("test", tokens[:length], SamplingParams(**params))
    seq = Sequence(0, request, 0, tokens, length, seed=request.params.seed or 0, sync_point=1 << 30, stored=stored)
    request.sequences.append(seq)
    return seq


def work(tokens: Iterable[int], *, stored: int = 0, rows: int | None = None, **params: Any) -> Work:
    """Work on a fresh sequence; rows: pending rows that run, None for all."""
    seq = sequence(tokens, stored=stored, **params)
    return Work(seq, seq.pending if rows is None else rows)


def view(works: Seq[Work], page: int = 32) -> PageView:
    """A page view in which every sequence has its own consecutive SHARED pages. Where w.first > 0, the tail began in an earlier
    forward."""
    pages, lengths, at = [], [], 0
    for w in works:
        n = -(-(len(w.seq.tokens) + 64) // page)
        pages.append(np.arange(at, at + n, dtype=np.int32)[None])
        lengths.append(np.asarray([w.seq.stored], np.int32))
        at += n
    kinds = [Lanes.SHARED] * len(works)
    return PageView(
        kinds, pages, lengths, [w.rows + w.first if w.first else 0 for w in works], [w.rows for w in works], [], [None] * len(works),
        [np.zeros((1, 0), np.int32)] * len(works), [None] * len(works), [None if w.rerun is None else w.rerun.slots for w in works],
    )  # fmt: skip
