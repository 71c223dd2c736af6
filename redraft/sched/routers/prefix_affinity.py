"""Prefix affinity: a request goes where recent prompts began alike, because their keys and values are still in that worker's cache.

Ruoyu Qin, Zheming Li, Weiran He, Mingxing Zhang, Yongwei Wu, Weimin Zheng, Xinran Xu, Mooncake: A KVCache-centric Disaggregated
Architecture for LLM Serving, 2024, arXiv 2407.00079; Vikranth Srivatsa, Zijian He, Reyna Abhyankar, Dongming Li, Yiying Zhang, Preble:
Efficient Distributed Prompt Scheduling for LLM Serving, 2024, arXiv 2407.00023.

1. A prompt is cut into blocks of BLOCK tokens. The key of a block covers the tenant, the adapter and all tokens before it.
2. The candidates are the workers that got the longest prefix of the prompt, in whole blocks. The one with the fewest tokens to compute
   is chosen.
3. If it has more than `overload` tokens to compute, for each token of the prefix, beyond those of the least loaded worker, that one
   takes the request.
4. The chosen worker has the prompt now. Of each worker the last `blocks` blocks are known, and none after it was started again.

Differs: the front does not see caches, so it assumes that a worker keeps what it computed last. Only the queue counts, no model of time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.options import Options, number
from redraft.sched.router import BLOCK, Load, least, serving


@dataclass(frozen=True)
class PrefixAffinity(Options):
    """overload: tokens that may wait before the request for each token that need not be computed; blocks: the most blocks that are known of
    a worker."""

    overload: float = number(4.0, ge=0)
    blocks: int = number(32768, ge=1)

    card: ClassVar[Card] = Card(
        title="Prefix affinity",
        paper="Qin et al., Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving, 2024, arXiv 2407.00079; "
        "Srivatsa et al., Preble: Efficient Distributed Prompt Scheduling for LLM Serving, 2024, arXiv 2407.00023",
        guarantee=Guarantee.SAME_TEXT,
        needs="several workers",
        deviates="the front assumes what caches hold; cost is counted in tokens",
        summary="To the worker whose cache has the prompt; the default",
    )

    def open(self) -> Affinity:
        return Affinity(self.overload, self.blocks)


class Affinity:
    any_stage: ClassVar[bool] = False

    def __init__(self, overload: float, blocks: int) -> None:
        self.overload, self.blocks = overload, blocks
        self.holders: dict[int, set[int]] = {}  # key of a block -> the workers that have it
        self.known: dict[int, OrderedDict[int, None]] = {}  # worker -> keys of its blocks, longest unused first
        self.starts: dict[int, int] = {}

    def route(self, request: Request, loads: Seq[Load], stage: int = 0) -> int:
        workers = serving(loads, stage)
        for i in workers:
            if self.starts.setdefault(i, loads[i].starts) != loads[i].starts:
                self._forget(i)
                self.starts[i] = loads[i].starts
        # 1.
        keys = list(block_keys(request, self.blocks))
        # 2. A block is touched before the ones that precede it, so whoever has it has these too.
        matched = next((i for i, key in enumerate(keys) if key not in self.holders), len(keys))
        near: list[int] = []
        while matched and not near:
            near = [i for i in workers if i in self.holders[keys[matched - 1]]]
            matched -= not near
        # 3. Of equally loaded workers, the one of which the least is known has the most room in its cache.
        fewest = loads[least(workers, loads)].tokens
        chosen = min((i for i in workers if loads[i].tokens == fewest), key=lambda i: len(self.known.get(i, ())))
        if near and loads[best := least(near, loads)].tokens - fewest <= self.overload * BLOCK * matched:
            chosen = best
        self._add(chosen, keys)  # 4.
        return chosen

    def _add(self, worker: int, keys: Seq[int]) -> None:
        known = self.known.setdefault(worker, OrderedDict())
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
            self.holders.setdefault(key, set()).add(worker)
        while len(known) > self.blocks:
            self._drop(worker, known.popitem(last=False)[0])

    def _forget(self, worker: int) -> None:
        for key in self.known.pop(worker, ()):
            self._drop(worker, key)

    def _drop(self, worker: int, key: int) -> None:
        holders = self.holders[key]
        holders.discard(worker)
        if not holders:
            del self.holders[key]


def block_keys(request: Request, most: int) -> Iterator[int]:
    """The keys of the prompt's first whole blocks, at most so many. The last token always runs, so it is in none of them."""
    tokens = request.prompt
    key = hash((request.salt, request.params.lora))
    for end in range(BLOCK, min(len(tokens), most * BLOCK + 1), BLOCK):
        key = hash((key, tuple(tokens[end - BLOCK : end])))
        yield key
