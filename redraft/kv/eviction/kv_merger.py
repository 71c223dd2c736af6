"""Replaces runs of neighbouring tokens with nearly parallel keys by one slot each, once, at the end of the prompt.

Zheng Wang, Boxiao Jin, Zhongzhi Yu, Minjia Zhang: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context
Tasks, 2024, arXiv 2407.08454.

1. A head protects the newest part `recent` of its slots and the part `heavy` of them that received most attention from all rows.
2. Walk back from the newest slot: a slot joins the run of the next one if the cosine of both keys exceeds `similar`. A protected slot ends
   a run, and so do `longest` slots.
3. The pivot of a run is its slot with most attention. Its position is that of the merged slot.
4. A slot has the weight exp(-d^2 / (2 s^2)), d its key's distance from the pivot's and s the mean distance of the run's other slots. Keys
   and values of the pivot become the mean with these weights.

Differs: generated tokens are not merged; runs have a limit; query heads of a kv head choose together; no layer is spared; `count` is an
addition. The number of slots follows from `similar`, so a text is admitted as if nothing were merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.tree import F32, F64, I32, I64
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.merge import Means, contents, means, neighbours, runs
from redraft.kv.eviction.parts import Even, Evicting, Mass, Selector
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number, word

FLOOR = 1e-6  # of the mean distance


@dataclass(frozen=True)
class Once:
    """One decision, at the end of the context, after which as many slots may stay as before."""

    never: bool

    def kept(self, context: int) -> int:
        return context

    def after(self, stored: int, context: int) -> int:
        return context if stored < context and not self.never else UNLIMITED

    def most(self, context: int) -> int:
        return UNLIMITED


class Merging(Evicting):
    """The opened policy for `count` lanes."""

    def __init__(self, method: KVMerger, count: int) -> None:
        super().__init__(count, trigger=Once(method.similar >= 1), scorer=Mass(UNLIMITED), selector=Selector(0, 1), allocator=Even())
        self.method, self.merges = method, method.weights != "pivot"

    def choose(self, seq: Sequence, sums: F64, lengths: I64, held: Held) -> Kept:
        lanes = enumerate(zip(sums[0], lengths.tolist(), strict=True))
        found = [self._lane(mass[:length], held.read(lane)[0][0]) for lane, (mass, length) in lanes]
        slots = [kept for kept, _ in found]
        return Kept(slots, contents(slots, [means for _, means in found], held, self.method.count) if self.merges else None)

    def _lane(self, mass: F64, keys: F32) -> tuple[I32, Means]:
        count = len(mass)
        protected = np.arange(count) >= count - int(self.method.recent * count)  # 1.
        best_first = np.argsort(-np.where(protected, -1.0, mass), kind="stable")
        protected[best_first[: int(self.method.heavy * count)]] = True
        joined = (neighbours(keys) > self.method.similar) & ~protected[:-1] & ~protected[1:]
        run = runs(joined, self.method.longest)  # 2.
        pivots = np.lexsort((mass, run))[np.searchsorted(run, np.arange(run[-1] + 1), "right") - 1].astype(np.int32)  # 3.
        many = np.flatnonzero(np.bincount(run)[run] > 1)
        dst = pivots[run[many]]
        return pivots, means(dst, many.astype(np.int32), self.gaussian(keys, dst, many))

    def gaussian(self, keys: F32, pivots: I32, slots: I64) -> F64:
        """The weight of each of `slots` in the mean at its pivot."""
        if self.method.weights != "gaussian":
            return np.ones(len(slots))
        gaps = keys[slots].astype(np.float64) - keys[pivots]
        square = np.einsum("nd,nd->n", gaps, gaps)  # 4.
        _, run = np.unique(pivots, return_inverse=True)
        total, others = np.zeros(run.max(initial=-1) + 1), np.bincount(run) - 1
        np.add.at(total, run, np.sqrt(square))
        scale = np.maximum(total / np.maximum(others, 1), FLOOR)
        weights: F64 = np.exp(-square / (2 * scale[run] ** 2))
        return weights


@dataclass(frozen=True)
class KVMerger(Options):
    """similar: above which cosine neighbours are merged, 1 for none; recent, heavy: the parts of the prompt that are never merged, the
    newest tokens and those with most attention; longest: slots of a run; weights: gaussian, mean, or pivot, which
    drops all others; count: whether a merged slot counts as the number of its tokens, in place of one."""

    similar: float = number(0.75, ge=-1, le=1)
    recent: float = number(0.15, ge=0, le=1)
    heavy: float = number(0.15, ge=0, le=1)
    longest: int = number(32, ge=2)
    weights: str = word("gaussian", "mean", "pivot")
    count: bool = False

    card: ClassVar[Card] = Card(
        "KVMerger",
        "Wang, Jin, Yu, Zhang, Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks, 2024, "
        "arXiv 2407.08454",
        Guarantee.LOSSY,
        deviates="generated tokens are not merged; runs have a limit; no layer is spared",
        summary="Merges runs of similar neighbours; long prompts",
    )

    def open(self, runner: Any) -> OpenEviction:
        return Merging(self, len(runner.spec.attention) * runner.spec.kv_heads)
