"""First come, first served: sequences get rows in arrival order, whole prompts as far as the budget allows.

This is the baseline. A long prompt that came first can take the whole budget of a step, and later texts wait. Continuous
batching as in Gyeong-In Yu, Joo Seong Jeong, Geon-Woo Kim, Soojeong Kim and Byung-Gon Chun, Orca, OSDI 2022.

Differs: the row budget bounds the length of a step. The cache is paged instead of reserved at full length.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
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

    def order(self, running: Seq[Sequence], waiting: Seq[Sequence] = ()) -> Iterable[Sequence]:
        return chain(running, waiting)
