"""Evicts once, at the end of the prompt, and gives each layer a budget of its own: all layers keep the same share of their attention.

Ao Wang, Hui Chen, Jiaxin Li, Jianchao Tan, Kefeng Zhang, Xunliang Cai, Zijia Lin, Jungong Han, Guiguang Ding: PrefixKV: Adaptive Prefix
KV Cache is What Vision Instruction-Following Models Need for Efficient Generation, 2024, arXiv 2412.03409.

1. Add up the attention that each slot of a layer received from the rows of the prompt, averaged over heads.
2. Order the slots of each layer by that. The kept slots are a prefix of the order.
3. Find one level: each layer keeps the shortest prefix with that share of its sum, and all layers together fill the budget.

Differs: the level is found by sorting the shares of all layers, which fills the budget exactly, instead of by bisection; the newest
`recent` slots are protected, not only the last; new tokens are never evicted; no ratios are stored from other texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED, Lanes
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import AtContext, EqualMass, Evicting, Mass, Selector
from redraft.options import Options, number


@dataclass(frozen=True)
class PrefixKV(Options):
    """budget: slots of the prompt that a layer keeps on average, or the part of the prompt if it is 1 or less; history: the number of the
    prompt's last rows to count, 0 for all, so that no prefix can come from other texts; sinks, recent: the number of first and of last
    tokens that always stay."""

    budget: float = number(0.25, gt=0, le=1 << 20)
    history: int = number(0, ge=0)
    sinks: int = number(4, ge=0)
    recent: int = number(8, ge=1)

    card: ClassVar[Card] = Card(
        "PrefixKV",
        "Wang, Chen, Li, Tan, Zhang, Cai, Lin, Han, Ding, PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following "
        "Models Need for Efficient Generation, 2024, arXiv 2412.03409",
        Guarantee.LOSSY,
        deviates="the budget is filled exactly; the newest tokens are spared; new tokens stay",
        summary="Layers with spread attention keep more; long prompts",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        layers, spared = len(runner.spec.attention), self.sinks + self.recent
        return Evicting(
            layers,
            trigger=AtContext(self.budget, least=spared + 1),
            scorer=Mass(self.history or UNLIMITED),  # 1.
            selector=Selector(self.sinks, self.recent),  # 2.
            allocator=EqualMass(spared, layers),  # 3.
            lanes=Lanes.PER_LAYER,
        )
