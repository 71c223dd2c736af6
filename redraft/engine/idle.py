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


def forward_seconds(engine: Engine, rows: int, cached: int = 0) -> float | None:
    """The time of one forward pass of `rows` rows after `cached` tokens: the last token of a text and a draft that is a chain. Nothing
    computed the cached keys and values. None if that does not fit into the context or the free memory."""
    runner, prompt = engine.runner, [0] * (cached + 1)
    seq = Sequence(0, Request("", prompt, SamplingParams(temperature=0), salt="\0idle"), 0, list(prompt), len(prompt), 0, cached + rows)
    if cached + rows > engine.max_model_len or runner.memory.need(seq, cached + rows) > runner.memory.available():
        return None
    tokens = np.arange(1, rows) % runner.spec.vocab
    work, trees = [Work(seq, 1)], [TokenTree.chain(tokens.tolist())]
    runner.memory.open(seq)
    try:
        if cached:
            chunk = [Work(seq, cached)]
            runner.memory.reserve(chunk, [EMPTY])
            runner.memory.commit(chunk, [Accepted()])
        batch = Batch.pack(work, trees, runner.memory.reserve(work, trees))
        began = perf_counter()
        runner.forward(batch, engine.drafter.own.taps)
        return perf_counter() - began
    finally:
        runner.memory.discard(seq)
        runner.memory.free(seq)
