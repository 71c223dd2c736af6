"""Keeps the first few tokens and a window of the newest, at positions counted within the cache: a text may go on for ever.

Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis: Efficient Streaming Language Models with Attention Sinks,
2023, arXiv 2309.17453.

1. A row sees the first `sinks` tokens, where trained models leave the attention that they need not, and the newest
   `recent`, itself among them; all else is forgotten.
2. Distances are those within the cache: the recent keys stay as they are, and for the sinks the query is turned back by as
   many positions as were forgotten. No position in use passes sinks + recent - 1.
3. What no later row can see is freed.

Differs: what a row sees is a mask of its own position, not of the step it ran in, so that chunks and drafts change nothing;
memory goes by whole pages behind a commit and may exceed sinks + recent by less than a page each plus one grid of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.core.tree import I32
from redraft.core.view import Window
from redraft.kv.eviction.eviction import OpenKeep, Stateless
from redraft.options import Options, number

GRID = 128  # rows between two sync points, about: enough to run a long prompt well, little beside a window


class Streaming(Stateless):
    """The opened policy over pages of `page` slots. first: slots of the pages that hold sinks; grid: rows between sync points."""

    endless = True

    def __init__(self, sinks: int, recent: int, page: int) -> None:
        self.window = Window(sinks, recent)  # 1. and 2.
        self.shareable_tokens = sinks + recent
        self.recent, self.page = recent, page
        self.first = -(-sinks // page) * page
        self.grid = max(1, min(recent, GRID) // page) * page
        # a step ends at most one grid behind a sync point, where the newest recent - 1 slots and what shares their pages were left
        self.max_slots = self.first + -(-(recent - 1) // page) * page + self.grid

    def sync_point(self, seq: Sequence) -> int:
        """Multiples of the grid, from the last one that a lane can hold whole."""
        return max(self.max_slots // self.grid, seq.stored // self.grid + 1) * self.grid

    def decide(self, seq: Sequence, positions: Callable[[], list[I32]]) -> list[I32] | None:
        """Whole pages only: slots keep their place within a page, so that pages are relisted and nothing moves."""
        gone = (seq.stored - self.recent + 1) // self.page * self.page  # 3. row `stored` sees positions above stored - recent
        if gone <= self.first or len((lanes := positions())[0]) == self.first + seq.stored - gone:
            return None
        return [np.flatnonzero((lane < self.first) | (lane >= gone)).astype(np.int32) for lane in lanes]


@dataclass(frozen=True)
class StreamingLLM(Options):
    """sinks: first tokens that stay for ever; recent: newest tokens that a row sees, itself included."""

    sinks: int = number(4, ge=0)
    recent: int = number(1020, ge=1)

    card: ClassVar[Card] = Card(
        "StreamingLLM",
        "Xiao, Tian, Chen, Han, Lewis, Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453",
        Guarantee.LOSSY,
        deviates="a mask of each row's position; memory is freed by whole pages",
        summary="Keeps the first and newest tokens; endless chats",
    )

    def open(self, runner: Any) -> OpenKeep:
        return Streaming(self.sinks, self.recent, runner.memory.paged.table.page)
