"""Join the shortest queue: the worker with the fewest tokens to compute takes the request.

Yinmin Zhong, Shengyu Liu, Junda Chen, Jianbo Hu, Yibo Zhu, Xuanzhe Liu, Xin Jin, Hao Zhang, DistServe: Disaggregating Prefill and
Decoding for Goodput-optimized Large Language Model Serving, 2024, arXiv 2401.09670, sends requests so in both stages.

1. A queued prompt counts by its tokens, and a text that draws tokens as TEXT of them.
2. The first worker with the smallest sum takes the request.

Differs: the paper counts requests. Workers that run both stages need one unit for queued prompts and for texts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Self

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.sched.router import Load, least, serving


@dataclass(frozen=True)
class LeastLoad:
    any_stage: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        title="Join the shortest queue",
        paper="Zhong et al., DistServe: Disaggregating Prefill and Decoding for Goodput-optimized LLM Serving, 2024, arXiv 2401.09670",
        guarantee=Guarantee.SAME_TEXT,
        needs="several workers",
        deviates="tokens are counted instead of requests",
        summary="Shortest queue in tokens; where prompts share nothing",
    )

    def open(self) -> Self:
        return self

    def route(self, request: Request, loads: Seq[Load], stage: int = 0) -> int:
        return least(serving(loads, stage), loads)
