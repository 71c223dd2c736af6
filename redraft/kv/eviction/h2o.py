"""Keeps the newest slots and the heavy hitters: those that received most attention from all rows so far.

Zhenyu Zhang, Ying Sheng, Tianyi Zhou, Tianlong Chen, Lianmin Zheng, Ruisi Cai, Zhao Song, Yuandong Tian, Christopher Re, Clark Barrett,
Zhangyang Wang, Beidi Chen: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, 2023, arXiv 2306.14048.

1. Add up the attention that every row of the text gave to each slot of a head.
2. At the end of the prompt a head keeps `budget` slots: the part `newest` of them are the last tokens, the others those with the
   largest sums.
3. While the text grows, evict again after every `drop` tokens. Sums go on.

Differs: `drop` tokens are evicted at once (in the paper one after each token), so a head holds up to budget + drop slots; weights are
averaged over the query heads of a kv head. Every row of the prompt must run, so no prefix is taken from other texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import UNLIMITED
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import AtContext, Even, Evicting, Mass, Selector
from redraft.options import Options, number

LEAST = 8  # slots


@dataclass(frozen=True)
class H2O(Options):
    """budget: slots that a kv head keeps, or the part of the prompt if it is 1 or less; newest: the part of them for the last tokens;
    drop: tokens between two evictions."""

    budget: float = number(0.25, gt=0, le=1 << 20)
    newest: float = number(0.5, ge=0, lt=1)
    drop: int = number(64, ge=1)

    card: ClassVar[Card] = Card(
        "H2O",
        "Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen, H2O: Heavy-Hitter Oracle for Efficient "
        "Generative Inference of Large Language Models, 2023, arXiv 2306.14048",
        Guarantee.LOSSY,
        deviates="evicts many tokens at once; query heads of a kv head choose together",
        summary="Keeps the newest and the most attended; long outputs",
        budget="budget={part}",
    )

    def open(self, runner: Any) -> OpenEviction:
        trigger = AtContext(self.budget, LEAST, self.drop)
        return Evicting(
            len(runner.spec.attention) * runner.spec.kv_heads,
            trigger=trigger,
            scorer=Mass(UNLIMITED),  # 1.
            selector=Selector(0, 1, self.newest),  # 2.
            allocator=Even(),
        )
