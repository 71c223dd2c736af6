"""Half of the heads see the first and newest tokens only; the others see all, or the pages that a sparse read chooses.

Shang Yang, Junxian Guo, Haotian Tang, Qinghao Hu, Guangxuan Xiao, Jiaming Tang, Yujun Lin, Zhijian Liu, Yao Lu, Song Han: LServe: Efficient
Long-sequence LLM Serving with Unified Sparse Attention, 2025, arXiv 2502.14866.

1. Once for each model: score the kv heads. The share `streaming` with the smallest scores streams.
2. A row of a streaming head sees the first `sinks` and the newest `local` tokens, at their true distances, in the prompt too.
3. Slots that no later row of a head sees are freed.
4. Other heads read all; with read=page-top-k, the pages that fit best.

Differs: heads are ranked by retrieval scores (kv/eviction/retrieval_heads.py), not by trained gates; the window of prompts is that of
generation, not 8,192; a page choice is not reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import NEVER, UNLIMITED, Lanes, Onset, Sequence
from redraft.core.view import Window
from redraft.kv.eviction.eviction import OpenEviction, StatelessEviction
from redraft.kv.eviction.retrieval_heads import opened
from redraft.kv.slots import Held, Kept
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner

GRID = 128  # rows between two sync points, about


class Duo(StatelessEviction):
    """The opened policy. streams: bool[L, K]; first: the slots of the pages that hold sinks; sync_every: rows between sync points."""

    lanes = Lanes.PER_HEAD

    def __init__(self, streams: NDArray[np.bool_], sinks: int, local: int, page: int) -> None:
        heads = tuple(tuple(layer) for layer in streams.tolist())
        self.window = Window(sinks, local, turned=False, heads=heads) if streams.any() else None
        self.streams, self.local, self.page = streams.ravel(), local, page
        self.first = -(-sinks // page) * page
        self.sync_every = max(1, min(local, GRID) // page) * page
        self.seen = sinks + local

    def sync_point(self, seq: Sequence) -> int:
        if self.window is None:
            return UNLIMITED
        return max(self._begins, (seq.stored // self.sync_every + 1) * self.sync_every)

    def gone(self, stored: int) -> int:
        """Tokens from `first` to here are seen by no later row of a streaming head."""
        return (stored - self.local + 1) // self.page * self.page

    @property
    def _begins(self) -> int:
        """The first sync point at which a page is freed."""
        return -(-(self.first + self.page + self.local - 1) // self.sync_every) * self.sync_every

    def onset(self, context: int) -> Onset:
        if self.window is None:
            return NEVER
        at = self._begins
        few = self.first + at - self.gone(at)
        return Onset(at, self.seen, slots=ceil(at + (few - at) * float(self.streams.mean())))

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        gone = self.gone(seq.stored)
        if self.window is None or seq.stored % self.sync_every or gone <= self.first:
            return None
        lanes = held.positions()
        lane = lanes[int(np.argmax(self.streams))]  # all that stream have the same positions
        if len(lane) == self.first + seq.stored - gone:
            return None
        kept = np.flatnonzero((lane < self.first) | (lane >= gone)).astype(np.int32)  # 3.
        return Kept([kept if some else np.arange(len(own), dtype=np.int32) for own, some in zip(lanes, self.streams, strict=True)])


@dataclass(frozen=True)
class DuoAttention(Options):
    """streaming: the share of kv heads that stream; sinks, local: the numbers of first and of newest tokens that these see; profile: the
    file of a calibration with --method razor, None for the place where that writes it."""

    streaming: float = number(0.5, ge=0, le=1)
    sinks: int = number(128, ge=0)
    local: int = number(256, ge=1)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "Streaming heads",
        "Yang, Guo, Tang, Hu, Xiao, Tang, Lin, Liu, Lu, Han, LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, "
        "2025, arXiv 2502.14866",
        Guarantee.LOSSY,
        needs="scores of the model's heads, once: redraft calibrate --method razor",
        deviates="retrieval scores in place of trained gates; one window for prompt and generation",
        summary="Half of the heads see a window; long contexts",
    )

    def open(self, runner: Runner) -> OpenEviction:
        """InvalidInput if there is no profile of the model; CheckpointError if it is damaged."""
        streams = opened(runner, self.profile, "duo").weakest(self.streaming)
        return Duo(streams, self.sinks, self.local, runner.memory.paged.table.page)
