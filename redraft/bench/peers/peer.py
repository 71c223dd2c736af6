"""The job of a measured engine, and its interface. Imports nothing heavy, because the parent process imports it too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

SPENT = 2.0  # seconds of one turn after which no repeat begins


@dataclass(frozen=True)
class Job:
    """What an engine measures; the same for all engines of a run except `options`. context: prompt tokens before the decoded tokens and
    before steps of many rows; tokens: tokens to generate; prefill: prompt tokens that are read at once; repeats: most repeats in a
    turn."""

    folder: str
    dtype: str
    threads: int
    vocab: int
    context: int
    tokens: int
    prefill: int
    rows: tuple[int, ...]
    repeats: int = 3
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """The most positions that a text of this run needs."""
        return max(self.context + max(self.tokens, *self.rows), self.prefill) + 1

    def prompt(self, length: int) -> list[int]:
        """Random ids, the same for all engines. A shorter prompt is the start of a longer one."""
        draw = random.Random(self.seed)
        return [draw.randrange(self.vocab) for _ in range(length)]


class Peer(Protocol):
    """One loaded engine. facts: for the report (version, dtype ...); does: names of the measurements below that it supports. Each
    measurement returns JSON."""

    facts: dict[str, Any]
    does: tuple[str, ...]

    def __init__(self, job: Job) -> None: ...

    def decode(self) -> dict[str, Any]:
        """{"seconds": of each generated token after the first, "tokens": all generated ids}. Greedy, without an end of text."""
        ...

    def prefill(self) -> dict[str, Any]:
        """{"seconds": of a prompt of `prefill` tokens up to its next token}"""
        ...

    def steps(self) -> dict[str, Any]:
        """{"seconds": {rows: of one forward pass over this many rows after the context, with the likeliest next token of every row}}"""
        ...


def timed(run: Callable[[], float], repeats: int) -> float:
    """The median of the seconds that `run` returns, over up to `repeats` runs; fewer if they take long."""
    begun, found = time.perf_counter(), [run()]
    while len(found) < repeats and time.perf_counter() - begun < SPENT:
        found.append(run())
    return median(found)
