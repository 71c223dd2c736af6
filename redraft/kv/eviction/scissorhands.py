"""A fixed number of slots for every head; when they are taken, those that attention passed over most often go, many at once.

Zichang Liu, Aditya Desai, Fangshuo Liao, Weitao Wang, Victor Xie, Zhaozhuo Xu, Anastasios Kyrillidis, Anshumali
Shrivastava: Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time,
2023, arXiv 2305.17118.

1. A slot is low in a row that gives it less than an even share, 1 / (slots that the row sees).
2. When `budget` slots of a head are taken, count how often each was low in the last `history` rows.
3. The newest `recent` are spared.
4. The budget * drop that were low most often go, of equals those that were given less in these rows, then the older. So it
   goes on, budget * drop tokens later.

Differs: weights are averaged over the query heads of a kv head (the paper has one each); the first `sinks` are spared too;
rows before the last decision are not looked at again, so that history beyond budget * drop has no effect from the second
decision on; a prompt is evicted from in the same way while it is read; all layers have the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.kv.eviction.eviction import OpenKeep
from redraft.kv.eviction.parts import Budgeted, Even, Evicting, SeldomLow


@dataclass(frozen=True)
class Scissorhands(Budgeted):
    """budget: slots of every kv head; drop: the part of them that goes when all are taken; history: newest rows that are looked
    at; recent, sinks: newest and first tokens that never go."""

    card: ClassVar[Card] = Card(
        "Scissorhands",
        "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava, Scissorhands: Exploiting the Persistence of Importance "
        "Hypothesis for LLM KV Cache Compression at Test Time, 2023, arXiv 2305.17118",
        Guarantee.LOSSY,
        deviates="sinks are spared; history ends at the last decision; the same budget for all layers",
        summary="Evicts the least attended, fixed slots; long outputs",
    )
    name: ClassVar[str] = "scissorhands"

    def open(self, runner: Any) -> OpenKeep:
        return Evicting(
            len(runner.spec.attention) * runner.spec.kv_heads,
            self.budget,
            scorer=SeldomLow(self.history),  # 1. and 2.
            selector=self.selector,  # 3.
            trigger=self.trigger,  # 4.
            allocator=Even(),
        )
