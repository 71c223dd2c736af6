"""Stall-free chunked prefill: decoding texts get rows first, and prompts get the rest of the row budget.

Amey Agrawal, Nitin Kedia, Ashish Panwar, Jayashree Mohan, Nipun Kwatra, Bhargav S. Gulavani, Alexey Tumanov and
Ramachandran Ramjee, Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, 2024, arXiv 2403.02310.

1. Decoding texts get one row each, and rows for their drafts, in arrival order.
2. Prompts in progress get chunks of the remaining rows.
3. New requests are admitted while there is memory for their whole prompt.

Differs: drafted nodes count as rows of the budget. A prompt is also cut at sync points.
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
class Sarathi(Scheduler):
    card: ClassVar[Card] = Card(
        title="Stall-free chunked prefill",
        paper="Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, 2024, arXiv 2403.02310",
        guarantee=Guarantee.SAME_TEXT,
        deviates="drafted nodes count as rows; chunks end at sync points",
        summary="Prompts in chunks beside decoding; the default",
    )

    def order(self, running: Seq[Sequence], waiting: Seq[Sequence] = ()) -> Iterable[Sequence]:
        # 1. to 3. The sort is stable, so both groups stay in arrival order.
        return chain(sorted(running, key=lambda seq: not seq.drawing), waiting)
