"""A fixed number of slots for every head. When they are full, it evicts many at once: those that received little attention most often.

Zichang Liu, Aditya Desai, Fangshuo Liao, Weitao Wang, Victor Xie, Zhaozhuo Xu, Anastasios Kyrillidis, Anshumali
Shrivastava: Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time,
2023, arXiv 2305.17118.

1. A slot is low in a row that gives it less than an even share of attention, 1 / (slots that the row sees).
2. When `budget` slots of a head are full, count how often each slot was low in the last `history` rows.
3. Protect the newest `recent` slots.
4. Evict the budget * drop slots that were low most often; of equal slots those with less attention in these rows, then the older.
   Repeat after budget * drop tokens.

Differs: weights are averaged over the query heads of a kv head (in the paper each has its own); the first `sinks` are protected too;
rows before the last decision do not count, so history beyond budget * drop has no effect from the second decision on; the same
eviction runs while a prompt is read; all layers have the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import Budgeted, Even, Evicting, SeldomLow


@dataclass(frozen=True)
class Scissorhands(Budgeted):
    """budget: slots of every kv head; drop: the fraction of them to evict when all are full; history: the number of newest rows to
    count; recent, sinks: the number of newest and of first tokens that are never evicted."""

    card: ClassVar[Card] = Card(
        "Scissorhands",
        "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava, Scissorhands: Exploiting the Persistence of Importance "
        "Hypothesis for LLM KV Cache Compression at Test Time, 2023, arXiv 2305.17118",
        Guarantee.LOSSY,
        deviates="sinks are spared; history ends at the last decision; the same budget for all layers",
        summary="Evicts the least attended, fixed slots; long outputs",
        budget="budget={tokens}",
    )
    name: ClassVar[str] = "scissorhands"

    def open(self, runner: Any) -> OpenEviction:
        return Evicting(
            len(runner.spec.attention) * runner.spec.kv_heads,
            scorer=SeldomLow(self.history),  # 1. and 2.
            selector=self.selector,  # 3.
            trigger=self.trigger,  # 4.
            allocator=Even(),
        )
