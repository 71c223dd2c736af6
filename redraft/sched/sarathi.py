"""Stall-free chunked prefill: texts that draw go first, prompts fill what is left of a budget of rows.

Amey Agrawal, Nitin Kedia, Ashish Panwar, Jayashree Mohan, Nipun Kwatra, Bhargav S. Gulavani, Alexey Tumanov and
Ramachandran Ramjee, Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, 2024, arXiv 2403.02310.

1. Texts in progress get one row each (and their drafts), in arrival order.
2. Prompts in progress get chunks of what is left.
3. Newcomers are admitted while the pages of their whole prompt are there.

Differs: drafted nodes count as rows of the budget; a prompt is cut at sync points too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
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

    def order(self, running: Seq[Sequence]) -> list[Sequence]:
        # 1. and 2.; the sort is stable, so both halves stay in arrival order
        return sorted(running, key=lambda seq: seq.pending > 1)
