"""The kv heads of a layer share a budget: the slots that the newest rows attend to most stay, whichever head they belong to.

Yuan Feng, Junlin Lv, Yukun Cao, Xike Xie, S. Kevin Zhou: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation
for Efficient LLM Inference, 2024, arXiv 2407.11550.

1. Score a slot by the attention that the last `history` rows gave it, as SnapKV does.
2. Protect the newest `recent` slots. They are those rows, and few rows have seen them, so their scores say little.
3. Every head keeps at least its best `floor` of the even share.
4. The rest of the layer's budget goes to the best slots of all its heads together, so heads with spread attention keep more.

Differs: it evicts whenever a layer is full, every budget * drop tokens, also while a prompt is read, not once at its end; scores are
not pooled over neighbours; the floor is a minimum (the paper mixes an even share with the adaptive one); weights are averaged over the
query heads of a kv head; the first `sinks` are protected too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import Across, Budgeted, Evicting, Mass
from redraft.options import number


@dataclass(frozen=True)
class AdaKV(Budgeted):
    """budget: slots of a kv head, on average over a layer; drop: the fraction of them to evict when all are full; history: the number
    of newest rows to count; recent, sinks: the number of newest and of first tokens that are never evicted; floor: the fraction of
    the even share that every head keeps."""

    history: int = number(32, ge=1)
    recent: int = number(32, ge=1)
    floor: float = number(0.2, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "Ada-KV",
        "Feng, Lv, Cao, Xie, Zhou, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
        "Inference, 2024, arXiv 2407.11550",
        Guarantee.LOSSY,
        deviates="evicts whenever the budget is full; scores are not pooled; the floor is a minimum",
        summary="Evicts the least attended, heads share; long prompts",
    )
    name: ClassVar[str] = "ada-kv"

    def open(self, runner: Any) -> OpenEviction:
        heads, trigger = runner.spec.kv_heads, self.trigger
        allocator = Across(heads, max(self.sinks + self.recent, int(self.floor * trigger.kept)))  # 3. and 4.
        return Evicting(
            len(runner.spec.attention) * heads,
            allocator.max_slots(trigger),
            scorer=Mass(self.history),  # 1.
            selector=self.selector,  # 2.
            trigger=trigger,
            allocator=allocator,
        )
