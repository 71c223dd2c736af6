"""Decode-maximal batches: a step has one chunk of one prompt, and all decoding texts ride along.

Amey Agrawal, Ashish Panwar, Jayashree Mohan, Nipun Kwatra, Bhargav S. Gulavani, Ramachandran Ramjee, SARATHI: Efficient LLM Inference by
Piggybacking Decodes with Chunked Prefills, 2023, arXiv 2308.16369.

1. Decoding texts get one row each, and rows for their drafts, in arrival order.
2. The first prompt gets a chunk of `rows` rows, which are enough to use the arithmetic of the machine. No other prompt runs in this step.
3. A new request is admitted when no prompt is in progress.

Differs: the paper has one chunk in every step of its experiments; here steps without a prompt have none. The last chunk of a prompt
is shorter. Chunks are not cut so that the step is a multiple of a tile, as the kernels here have none of that size.
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
class Piggyback(Scheduler):
    """rows: the rows of a chunk."""

    rows: int = number(256, ge=1)

    card: ClassVar[Card] = Card(
        title="SARATHI",
        paper="Agrawal et al., SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills, 2023, arXiv 2308.16369",
        guarantee=Guarantee.SAME_TEXT,
        deviates="steps without a prompt have no chunk; last chunks are shorter; no alignment to tiles",
        summary="One chunk of one prompt a step; to compare with sarathi",
    )

    def order(self, running: Seq[Sequence], waiting: Seq[Sequence] = ()) -> Iterable[Sequence]:
        return chain(sorted(running, key=lambda seq: not seq.drawing), waiting)  # 1.

    def chunk(self, left: int, prompts: int) -> int:
        return 0 if prompts else min(self.rows, left)  # 2. and 3.
