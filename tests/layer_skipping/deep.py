"""A tiny model of six layers, the dense definition of rows that skip layers, and an engine with this model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.core.spec import ModelSpec
from redraft.engine.engine import Engine
from redraft.models.runner import Runner
from redraft.ops.backend import LayerWeights, Linear, Weights
from redraft.sample.sampler import Sampler
from tests.arrays import BACKEND, placed
from tests.contracts import plain
from tests.contracts.identity import prompts

LAYERS = 6
ALL = frozenset(range(LAYERS))


@cache
def deep(power: float = 0.3) -> tuple[ModelSpec, Weights]:
    """plain.py's tiny model with more layers. Layers between the first and the last add `power` times their usual output; at 0 they
    do not change the hidden state."""
    spec, weights = plain.tiny(layers=LAYERS)
    first, *between, last = weights.layers
    return spec, replace(weights, layers=(first, *(_weaker(layer, power) for layer in between), last))


def _weaker(layer: LayerWeights, power: float) -> LayerWeights:
    assert layer.down is not None
    return replace(layer, out=Linear(layer.out.weight * power), down=Linear(layer.down.weight * power))


def logits(tokens: Seq[int], runs: Seq[frozenset[int]], power: float = 0.3, feeds: Seq[frozenset[int]] | None = None) -> plain.Numbers:
    """[T, V]: plain.logits of the deep model if row t runs only the layers runs[t] and stores keys only in these. feeds: the layers whose
    MLP it runs, if they are others."""
    spec, weights = deep(power)
    x = weights.embed[list(tokens)]
    for i, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        if at := [t for t, layers in enumerate(runs) if i in layers]:
            qkv = plain.linear(plain.rms(x[at], w.attn_norm, layer.norm), w.qkv)
            x[at] += plain.linear(plain.attention(qkv, spec.attention[i], np.array(at)), w.out)
        if at := [t for t, layers in enumerate(feeds or runs) if i in layers]:
            x[at] += plain.mlp(plain.rms(x[at], w.mlp_norm, layer.norm), w)
    return plain.linear(plain.rms(x, weights.final_norm, spec.final_norm), weights.head)


def engine(open_drafter: Callable[[Runner, Sampler], Any] | None = None, *, backend: str = BACKEND, power: float = 0.3, pool: int = 40,
           chunk: int = 512, verify: str = "coupled", rows: int = 8, eos: tuple[int, ...] = ()) -> Engine:  # fmt: skip
    """An engine with the deep model, float64."""
    spec, weights = deep(power)
    made = registry.backend(backend)("float64")
    runner = Runner(spec, placed(made, weights), made, pool)
    verifier = registry.create("verify", verify)
    sampler = Sampler(spec.vocab, frozenset(eos), drafts=verifier.drafts)
    opened = open_drafter(runner, sampler) if open_drafter else registry.create("draft", "none").open(runner, sampler)
    sched = registry.create("sched", "sarathi", token_budget=chunk, max_seqs=8, draft_rows=rows, draft_total=8 * rows)
    return Engine(runner, sched, opened, verifier, sampler, max_model_len=128, eos=eos)


def requests(params: SamplingParams, count: int = 4, first: int = 0) -> list[Request]:
    """Request i has prompt i and seed 100 + i."""
    return [Request(str(i), list(prompts()[i]), params.but(seed=100 + i)) for i in range(first, first + count)]
