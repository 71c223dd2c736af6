"""Steps that are timed while no request is under way. They leave no trace: no request, no page, no statistics."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import EMPTY, TokenTree

if TYPE_CHECKING:
    from redraft.engine.engine import Engine
    from redraft.models.adapter import Adapter


def forward_seconds(engine: Engine, rows: int, cached: int = 0, texts: int = 1, adapter: Adapter | None = None) -> float | None:
    """The time of one forward pass of `rows` rows, spread evenly over `texts` texts (as many rows or more) with `cached` tokens each: the
    last token of a text and a draft that is a chain, with this adapter. Nothing computed the cached keys and values. None if that does not
    fit into the context or the free memory."""
    runner, prompt, greedy = engine.runner, [0] * (cached + 1), SamplingParams(temperature=0)
    sizes = [rows // texts + (i < rows % texts) for i in range(texts)]
    seqs = [
        Sequence(i, Request("", prompt, greedy, salt="\0idle", adapter=adapter), 0, list(prompt), len(prompt), 0, cached + size)
        for i, size in enumerate(sizes)
    ]
    needed = sum(runner.memory.need(seq, cached + size) for seq, size in zip(seqs, sizes, strict=True))
    if cached + sizes[0] > engine.max_model_len or needed > runner.memory.available():
        return None
    work = [Work(seq, 1) for seq in seqs]
    trees = [TokenTree.chain((np.arange(1, size) % runner.spec.vocab).tolist()) for size in sizes]
    for seq in seqs:
        runner.memory.open(seq)
    try:
        for seq in seqs if cached else ():
            chunk = [Work(seq, cached)]
            runner.memory.reserve(chunk, [EMPTY])
            runner.memory.commit(chunk, [Accepted()])
        batch = Batch.pack(work, trees, runner.memory.reserve(work, trees))
        began = perf_counter()
        runner.forward(batch, engine.drafter.own.taps)
        return perf_counter() - began
    finally:
        for seq in seqs:
            runner.memory.discard(seq)
            runner.memory.free(seq)
