"""Merges a prompt's less important tokens into their neighbours once, and later drops the slot at a fixed place.

Zuyan Liu, Benlin Liu, Jiahui Wang, Yuhao Dong, Guangyi Chen, Yongming Rao, Ranjay Krishna, Jiwen Lu: Efficient Inference of Vision
Instruction-Following Models with Elastic Cache, 2024, arXiv 2407.18121.

1. Add up the attention that each slot of a layer received from the rows of the prompt, averaged over heads.
2. Keep the part `budget` of the slots: the first and the last, and those with the largest sums.
3. Every other slot joins the nearest of those with the largest sums. Keys and values of that slot become the plain mean.
4. While the text grows, keep the part `budget` of the new tokens: drop the slot `distance` places before the end of what the prompt left,
   so that the rest of the prompt and the newest tokens stay. No attention is watched.

Differs: `drop` tokens are awaited before slots are dropped, all at once, which leaves the slots that dropping one by one leaves; ranks and
indices are those of the text (the released code shifts them).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED, Onset, Sequence
from redraft.core.tree import F64, I64
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.merge import contents, evicted, joins, nearest
from redraft.kv.eviction.parts import AtContext, Even, Evicting, Mass, Selector
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number


class Elastic(Evicting):
    """The opened policy for `layers` layers with `heads` kv heads."""

    def __init__(self, method: ElasticCache, layers: int, heads: int) -> None:
        trigger = AtContext(method.budget, least=method.distance + 2)
        super().__init__(
            layers * heads,
            trigger=trigger,
            scorer=Mass(UNLIMITED),  # 1.
            selector=Selector(1, 1),  # 2.
            allocator=Even(),
        )
        self.method, self.heads, self.merges, self.once = method, heads, method.merge, False

    def onset(self, context: int) -> Onset:
        found = super().onset(context)
        return found._replace(longest=UNLIMITED - 1) if found.at < UNLIMITED else found  # lanes grow, but are evicted from again

    def sync_point(self, seq: Sequence) -> int:
        first, drop = self.trigger.after(0, seq.context), self.method.drop
        return first if seq.stored < first else first + ((seq.stored - first) // drop + 1) * drop

    def choose(self, seq: Sequence, sums: F64, lengths: I64, held: Held) -> Kept:
        layers = sums.reshape(len(sums), -1, self.heads, sums.shape[-1]).mean(2)
        slots = super().choose(seq, np.repeat(layers, self.heads, 1), lengths, held).slots
        if not self.merges:
            return Kept(slots)
        gone = [evicted(kept, length) for kept, length in zip(slots, lengths.tolist(), strict=True)]
        anchors = [kept[1:-1] for kept in slots]
        each = [joins(kept, lost, nearest(kept, lost)) for kept, lost in zip(anchors, gone, strict=True)]  # 3.
        return Kept(slots, contents(slots, each, held))

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        if (kept := super().decide(seq, held)) is not None:
            return kept
        new = seq.stored - self.trigger.after(0, seq.context)  # 4.
        if new < self.method.drop:
            return None
        due, prompt, length = new // self.method.drop * self.method.drop, self.trigger.kept(seq.context), len(held.positions()[0])
        wanted, first = prompt + ceil(self.method.budget * due) + new - due, prompt - self.method.distance
        if length <= wanted:
            return None
        return Kept([np.r_[:first, first + length - wanted : length].astype(np.int32)] * self.count)


@dataclass(frozen=True)
class ElasticCache(Options):
    """budget: the part of the tokens whose slots stay; distance: slots of the prompt behind the place from which slots are dropped; drop:
    tokens between two evictions; merge: whether evicted slots of the prompt join others, false to drop them."""

    budget: float = number(0.5, gt=0, le=1)
    distance: int = number(25, ge=1)
    drop: int = number(32, ge=1)
    merge: bool = True

    card: ClassVar[Card] = Card(
        "Elastic Cache",
        "Liu, Liu, Wang, Dong, Chen, Rao, Krishna, Lu, Efficient Inference of Vision Instruction-Following Models with Elastic "
        "Cache, 2024, arXiv 2407.18121",
        Guarantee.LOSSY,
        deviates="drops many tokens at once; ranks and indices are those of the text",
        summary="Merges a prompt's tokens into neighbours; long prompts",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        return Elastic(self, len(runner.spec.attention), runner.spec.kv_heads)
