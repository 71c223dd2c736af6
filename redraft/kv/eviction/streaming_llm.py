"""Keeps the first few tokens and a window of the newest, at positions counted within the cache. Texts may have any length.

Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis: Efficient Streaming Language Models with Attention Sinks,
2023, arXiv 2309.17453.

1. A row sees the first `sinks` tokens, which receive the attention that trained models do not need elsewhere, and the newest
   `recent` tokens, itself included. Other tokens are hidden.
2. Distances are those within the cache: recent keys do not change, and for the sinks the query is rotated back by the number of
   hidden tokens. No position in use exceeds sinks + recent - 1.
3. Slots that no later row can see are freed.

Differs: the mask of a row depends on its position, not on the step that runs it, so chunks and drafts change nothing; memory is freed
by whole pages after a commit, and may exceed sinks + recent by less than a page each plus `sync_every` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Onset, Sequence
from redraft.core.view import Window
from redraft.kv.eviction.eviction import OpenEviction, StatelessEviction
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number

GRID = 128  # rows between two sync points, about: large enough to run long prompts fast, small compared with a window


class Streaming(StatelessEviction):
    """The opened policy, for pages of `page` slots. first: the slots of the pages that hold sinks; sync_every: rows between sync points."""

    endless = True

    def __init__(self, sinks: int, recent: int, page: int) -> None:
        self.window = Window(sinks, recent)  # 1. and 2.
        self.sinks, self.recent, self.page = sinks, recent, page
        self.first = -(-sinks // page) * page
        self.sync_every = max(1, min(recent, GRID) // page) * page
        # a step ends at most sync_every rows after a sync point, at which the pages of the newest recent - 1 slots were kept
        self.max_slots = self.first + -(-(recent - 1) // page) * page + self.sync_every

    def sync_point(self, seq: Sequence) -> int:
        """The next multiple of sync_every, starting with the largest one that fits in max_slots."""
        return max(self.max_slots // self.sync_every, seq.stored // self.sync_every + 1) * self.sync_every

    def onset(self, context: int) -> Onset:
        return Onset(self.max_slots, self.sinks + self.recent, slots=self.max_slots, most=self.max_slots, longest=self.max_slots)

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        """Evicts whole pages, whose slots keep their places, so nothing is copied. Only at sync points: attention adds in an order that
        depends on which pages there are."""
        if seq.stored % self.sync_every:
            return None
        gone = (seq.stored - self.recent + 1) // self.page * self.page  # 3. row `stored` sees positions above stored - recent
        if gone <= self.first or len((lanes := held.positions())[0]) == self.first + seq.stored - gone:
            return None
        return Kept([np.flatnonzero((lane < self.first) | (lane >= gone)).astype(np.int32) for lane in lanes])


@dataclass(frozen=True)
class StreamingLLM(Options):
    """sinks: the number of first tokens that always stay; recent: the number of newest tokens that a row sees, itself included."""

    sinks: int = number(4, ge=0)
    recent: int = number(1020, ge=1)

    card: ClassVar[Card] = Card(
        "StreamingLLM",
        "Xiao, Tian, Chen, Han, Lewis, Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453",
        Guarantee.LOSSY,
        deviates="a mask of each row's position; memory is freed by whole pages",
        summary="Keeps the first and newest tokens; endless chats",
        budget="sinks=4,recent={recent}",
    )

    def open(self, runner: Any) -> OpenEviction:
        return Streaming(self.sinks, self.recent, runner.memory.paged.table.page)
