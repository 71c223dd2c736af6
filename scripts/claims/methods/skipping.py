"""Layers that are skipped after a given text: nats that the right tokens lose."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from redraft import registry
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Accepted, Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.ops.arrays import array
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab

LENGTH, GIVEN, SPEEDUP = 256, 64, 2.0


def nats(lab: Lab, layers: Iterable[int] | None) -> F64:
    """The mean log-probability of each text's tokens behind GIVEN, whose rows run these layers."""
    runner = lab.llm.runner
    chosen = None if layers is None else Layers.whole(layers)
    found = []
    for probe in lab.tasks(LENGTH, 6)["standard library"].probes:
        seq, logits = sequence(probe.ids, prompt_logprobs=0), []
        runner.memory.open(seq)
        try:
            for rows in (GIVEN, len(probe.ids) - GIVEN):
                seq.layers = chosen if seq.stored else None
                work = [Work(seq, rows)]
                out = runner.forward(Batch.pack(work, [EMPTY], runner.memory.reserve(work, [EMPTY])), Taps(logits=True))
                assert out.logits is not None
                logits.append(array(out.logits).astype(np.float64))
                runner.memory.move(runner.memory.commit(work, [Accepted()]))
        finally:
            runner.memory.free(seq)
        last = logits[1][:-1]
        last -= last.max(1, keepdims=True)
        right = last[np.arange(len(last)), probe.ids[GIVEN + 1 :]]
        found.append(float((right - np.log(np.exp(last).sum(1))).mean()))
    return np.array(found)


def balanced(lab: Lab) -> list[int]:
    return sorted(registry.create("depth", f"layer-skip:speedup={SPEEDUP}").layers(len(lab.llm.runner.spec.layers)))


def even_or_block(lab: Lab) -> Found:
    """Against the better of two blocks of as many layers: those before the last one, and those behind the first one."""
    even, count = balanced(lab), len(lab.llm.runner.spec.layers)
    gone = count - len(even)
    blocks = {"lower": {*range(count)} - {*range(1, 1 + gone)}, "upper": {*range(count)} - {*range(count - 1 - gone, count - 1)}}
    full, own = nats(lab, None), nats(lab, even)
    losses = {name: nats(lab, kept) for name, kept in blocks.items()}
    best = max(losses, key=lambda name: losses[name].mean())
    found = ", ".join(f"{name} block {np.mean(one - full):+.2f}" for name, one in losses.items())
    return Found(own - losses[best], [f"{gone} of {count} layers skipped: evenly {np.mean(own - full):+.2f}, {found} nats"])


def even_loss(lab: Lab) -> Found:
    return Found(nats(lab, balanced(lab)) - nats(lab, None))


CLAIMS = (
    Claim("layer-skip-even", ("depth=layer-skip",), "Evenly spaced layers lose less than a block that is left out",
          "running text, 15 of 30 layers behind 64 tokens, no tuning; the better of two blocks",
          "nats a token, even minus block", even_or_block),
    Claim("layer-skip-loss", ("depth=layer-skip",),
          "Half of the layers can be left out with little loss (here: 0.2 nats); the paper tunes the model",
          "the same, against all layers", "nats a token, change", even_loss, border=-0.2),
)  # fmt: skip
