"""Workers take requests in turn, whatever their load.

This is the baseline of routers. Each stage has its own turn. Workers that are not alive are left out.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.sched.router import Load, serving


@dataclass(frozen=True)
class RoundRobin:
    card: ClassVar[Card] = Card(
        title="Round robin",
        paper="",
        guarantee=Guarantee.SAME_TEXT,
        needs="several workers",
        summary="Workers in turn; where requests are alike",
    )

    def open(self) -> Turns:
        return Turns()


class Turns:
    any_stage: ClassVar[bool] = False

    def __init__(self) -> None:
        self.last: dict[int, int] = {}  # stage -> the worker that had the last turn

    def route(self, request: Request, loads: Seq[Load], stage: int = 0) -> int:
        workers, last = serving(loads, stage), self.last.get(stage, -1)
        self.last[stage] = chosen = next((i for i in workers if i > last), workers[0])
        return chosen
