"""The kv heads of a layer share a budget: the slots that the prompt's last rows attend to most stay, whichever head they belong to.

Yuan Feng, Junlin Lv, Yukun Cao, Xike Xie, S. Kevin Zhou: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation
for Efficient LLM Inference, 2024, arXiv 2407.11550.

1. Score slots at the end of the prompt as SnapKV does (snap_kv.py), and protect the same ones.
2. Every head keeps at least its best `floor` of the even share.
3. The rest of the layer's budget goes to the best slots of all its heads together, so heads with spread attention keep more.

Differs: the floor is a minimum (the paper mixes an even share with the adaptive one); otherwise as SnapKV here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import Across, Evicting
from redraft.kv.eviction.snap_kv import SnapKV
from redraft.options import number


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """budget: slots of the prompt that a kv head keeps on average over its layer, or the part of the prompt if it is 1 or less; window: the
    number of its last rows, which observe and stay; pool: the number of neighbouring slots that share their attention, odd; sinks: the
    number of first tokens that always stay; drop: new tokens between two further evictions, 0 for none; floor: the fraction of the even
    share that every head keeps."""

    floor: float = number(0.2, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "Ada-KV",
        "Feng, Lv, Cao, Xie, Zhou, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
        "Inference, 2024, arXiv 2407.11550",
        Guarantee.LOSSY,
        deviates="the floor is a minimum; query heads of a kv head choose together; sinks are spared",
        summary="As SnapKV, and the heads of a layer share; long prompts",
        budget="budget={part}",
    )
    name: ClassVar[str] = "ada-kv"

    def open(self, runner: Any) -> OpenEviction:
        heads = runner.spec.kv_heads
        allocator = Across(heads, self.floor, self.sinks + self.window)  # 2. and 3.
        return Evicting(len(runner.spec.attention) * heads, allocator=allocator, **self.parts)
