"""Evicts once, at the end of the prompt: the slots that its last rows attend to stay, chosen for each head.

Yuhong Li, Yingbing Huang, Bowen Yang, Bharat Venkitesh, Acyr Locatelli, Hanchen Ye, Tianle Cai, Patrick Lewis, Deming Chen: SnapKV: LLM
Knows What You are Looking for Before Generation, 2024, arXiv 2404.14469.

1. The last `window` rows of the prompt observe: add up the attention that each gives to every slot.
2. Average the sums over `pool` neighbouring slots, so that what stands beside an important token stays too.
3. Each head keeps the slots with the largest sums, and the observing rows themselves.
4. With `drop`, the same happens again whenever `drop` new tokens are there. Without it new tokens stay.

Differs: step 4 is ours, so that long outputs stay small too; weights are averaged over the query heads of a kv head, before the choice;
the first `sinks` are protected too. The first new token is drawn before the eviction, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import AtContext, Even, Evicting, Mass, Selector
from redraft.options import Options, number


@dataclass(frozen=True)
class SnapKV(Options):
    """budget: slots that a kv head keeps of the prompt, or the part of the prompt if it is 1 or less; window: the number of its last rows,
    which observe and stay; pool: the number of neighbouring slots that share their attention, odd; sinks: the number of first tokens
    that always stay; drop: new tokens between two further evictions, 0 for none.

    Measured on SmolLM2 with prompts of 4,000 tokens that hide a number of five digits, each a token: of 12 numbers, 12 were right with
    pool=15 and a tenth kept, 2 with pool=7, which is the paper's.
    """

    budget: float = number(0.25, gt=0, le=1 << 20)
    window: int = number(32, ge=1)
    pool: int = number(15, ge=1)
    sinks: int = number(4, ge=0)
    drop: int = number(0, ge=0)

    card: ClassVar[Card] = Card(
        "SnapKV",
        "Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen, SnapKV: LLM Knows What You are Looking for Before "
        "Generation, 2024, arXiv 2404.14469",
        Guarantee.LOSSY,
        deviates="query heads of a kv head choose together; sinks are spared; may evict again",
        summary="Keeps what a prompt's end attends to; long prompts",
        budget="budget={part}",
    )

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise InvalidInput(f"{self.name}:pool={self.pool}: must be odd, a slot and as many on each side")

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "trigger": AtContext(self.budget, self.window + self.sinks + 1, self.drop),  # 4.
            "scorer": Mass(self.window, self.pool, self.window),  # 1. and 2.
            "selector": Selector(self.sinks, self.window),  # 3.
        }

    def open(self, runner: Any) -> OpenEviction:
        return Evicting(len(runner.spec.attention) * runner.spec.kv_heads, allocator=Even(), **self.parts)
