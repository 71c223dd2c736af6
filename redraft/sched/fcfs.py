"""First come, first served: rows go out in arrival order, whole prompts as far as the budget reaches.

The plain baseline: a long prompt that came first takes the budget, and texts after it wait for the step. Continuous
batching as in Gyeong-In Yu, Joo Seong Jeong, Geon-Woo Kim, Soojeong Kim and Byung-Gon Chun, Orca, OSDI 2022.

Differs: rows are capped by the budget, so that one step stays bounded; pages are paged, not reserved at full length.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.sched.scheduler import Scheduler


@dataclass(frozen=True)
class FCFS(Scheduler):
    card: ClassVar[Card] = Card(
        title="First come, first served",
        paper="Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models, OSDI 2022",
        guarantee=Guarantee.SAME_TEXT,
        deviates="rows capped by the budget; paged cache",
        summary="Whole prompts in order of arrival; for batch jobs",
    )

    def order(self, running: Seq[Sequence]) -> list[Sequence]:
        return list(running)
