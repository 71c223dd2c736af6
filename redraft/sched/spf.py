"""Shortest prompt first, with ageing: after decoding texts, the prompt with the fewest remaining tokens gets rows.

Xiaoxiang Shi, Colin Cai, Junjia Du, Zhihao Jia, Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving, 2025,
arXiv 2507.06608, section on scheduling within a phase.

1. Decoding texts get one row each, and rows for their drafts, in arrival order.
2. The score of a prompt, waiting or in progress, is its remaining tokens minus gamma times the seconds since it arrived. Prompts get rows
   and are admitted by ascending score. As all prompts age alike, remaining tokens plus gamma times the time of arrival gives this order.
3. gamma=0 is shortest first, under which a long prompt can wait for ever. With a larger one, a prompt of n tokens precedes every prompt
   that arrives n / gamma seconds later.

Differs: both phases share a step, as in sarathi. Priorities of requests precede scores. A prefix in the cache still counts as remaining.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.options import number
from redraft.sched.scheduler import Scheduler


@dataclass(frozen=True)
class ShortestPromptFirst(Scheduler):
    """gamma: the tokens that a second of waiting is worth."""

    gamma: float = number(15.0, ge=0)

    card: ClassVar[Card] = Card(
        title="Shortest prompt first with ageing",
        paper="Shi et al., Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving, 2025, arXiv 2507.06608",
        guarantee=Guarantee.SAME_TEXT,
        deviates="both phases share a step; priorities precede scores; cached prefixes count as remaining",
        summary="Short prompts pass long ones; for mixed lengths",
    )

    def order(self, running: Seq[Sequence], waiting: Seq[Sequence] = ()) -> Iterable[Sequence]:
        drawing = [seq for seq in running if seq.drawing]  # 1.
        prompts = [seq for seq in running if not seq.drawing]
        return chain(drawing, sorted(chain(prompts, waiting), key=self.rank))  # 2.

    def rank(self, seq: Sequence) -> tuple[int, float]:
        request = seq.request
        return request.priority, seq.pending + self.gamma * (request.arrived or 0.0)
