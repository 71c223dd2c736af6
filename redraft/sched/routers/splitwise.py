"""Splitwise: prompts and decoding run in two pools of workers, and workers move to a mixed pool when one of the pools is full.

Pratyush Patel, Esha Choukse, Chaojie Zhang, Aashaka Shah, Íñigo Goiri, Saeed Maleki, Ricardo Bianchini, Splitwise: Efficient Generative
LLM Inference Using Phase Splitting, 2023, arXiv 2311.18677.

1. A mixed worker without work returns to its own pool. A worker that runs both stages is always mixed.
2. The prompt goes to the prompt worker with the fewest queued tokens. It is full if it has a queue that would exceed `queue` tokens.
3. The rest goes to the token worker with the most free blocks. It is full if prompt and max_tokens would take all of them.
4. If that worker is full, the mixed pool is tried in the same way, then the best worker of the other pool becomes a mixed one.
5. If nothing fits, the least loaded worker of the stage and the mixed pool takes it.

Differs: the output is unknown, so memory is counted for max_tokens. Schedulers of mixed workers never stop texts for prompts, so nothing
has to age.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.errors import Unavailable
from redraft.options import Options, number
from redraft.sched.router import BLOCK, Load


@dataclass(frozen=True)
class Splitwise(Options):
    """queue: the most queued tokens of a worker that takes another prompt."""

    queue: int = number(8192, ge=0)

    card: ClassVar[Card] = Card(
        title="Splitwise",
        paper="Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, 2023, arXiv 2311.18677",
        guarantee=Guarantee.SAME_TEXT,
        needs="workers for prompts and workers for decoding",
        deviates="memory is counted for max_tokens; schedulers of mixed workers never stop texts for prompts",
        summary="Two pools and a mixed one; where load shifts",
    )

    def open(self) -> Pools:
        return Pools(self.queue)


class Pools:
    any_stage: ClassVar[bool] = True

    def __init__(self, queue: int) -> None:
        self.queue = queue
        self.moved: set[int] = set()  # workers of one stage that are in the mixed pool

    def route(self, request: Request, loads: Seq[Load], stage: int = 0) -> int:
        self.moved = {i for i in self.moved if i < len(loads) and loads[i].tokens}  # 1.
        own, mixed, other = self.pools(loads, stage)
        for pool in (own, mixed, other):  # 4.
            if pool and self.fits(request, loads[best := _best(pool, loads, stage)], stage):
                break
        else:
            if not (left := own + mixed or other):
                raise Unavailable(f"none of {len(loads)} workers can take a request now")
            best = _best(left, loads, stage)  # 5.
        if best in other:
            self.moved.add(best)
        return best

    def pools(self, loads: Seq[Load], stage: int) -> tuple[list[int], list[int], list[int]]:
        """The workers that are alive: those of this stage, the mixed ones and those of the other stage."""
        own: list[int] = []
        mixed: list[int] = []
        other: list[int] = []
        for i, load in enumerate(loads):
            if load.alive:
                pool = mixed if i in self.moved or len(load.stages) > 1 else own if stage in load.stages else other
                pool.append(i)
        return own, mixed, other

    def fits(self, request: Request, load: Load, stage: int) -> bool:
        prompt = len(request.prompt)
        if stage == 0:  # 2.
            return not load.queued_tokens or load.queued_tokens + prompt <= self.queue
        return -(-(prompt + (request.params.max_tokens or 0)) // BLOCK) < load.free_blocks  # 3.


def _best(pool: Seq[int], loads: Seq[Load], stage: int) -> int:
    return min(pool, key=lambda i: loads[i].queued_tokens if stage == 0 else -loads[i].free_blocks)
