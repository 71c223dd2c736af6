"""One step of a toy model: logits are a function of the context, packed as in the engine."""

from __future__ import annotations

import numpy as np

from redraft.core.batch import Batch
from redraft.core.noise import mix
from redraft.core.plan import Work
from redraft.core.testing import sequence, view
from redraft.core.tree import EMPTY
from redraft.ops.backend import ForwardResult


def toy_logits(context, vocab):
    """Some function of the whole context with few distinct values, so that ties are common."""
    rng = np.random.default_rng(mix(1, *context))
    return np.round(rng.normal(size=vocab) * 2, 1)


def begun(sampler, tokens, prompt_len=None, seed=0, **params):
    seq = sequence(tokens, stored=len(list(tokens)) - 1, prompt_len=prompt_len, **params)
    seq.seed = seed
    seq.state[sampler] = sampler.begin(seq)
    return seq


def step(sampler, seqs, trees=None, logits=toy_logits, place=np.asarray):
    """The distribution of one step in which every sequence runs all pending tokens."""
    trees = trees or [EMPTY] * len(seqs)
    works = [Work(seq, seq.pending) for seq in seqs]
    batch = Batch.pack(works, trees, view(works))
    rows = []
    for r in batch.logit_rows.tolist():
        s = int(np.searchsorted(batch.starts, r, side="right")) - 1
        node = r - int(batch.tree_starts[s])
        seen = seqs[s].tokens[: int(batch.positions[r]) + 1]
        context = seen if node < 0 else seqs[s].tokens + trees[s].tokens[trees[s].path_to(node)].tolist()
        rows.append(logits(context, sampler.vocabulary.size))
    table = np.asarray(rows)
    # numpy's argmax: the lowest id wins ties, as ForwardResult promises
    out = ForwardResult(table.argmax(-1).astype(np.int32), logits=place(table))
    return sampler.distribution(out, batch, works, trees)
