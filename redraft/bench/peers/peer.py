"""The job of a measured engine, and its interface. Imports nothing heavy, because the parent process imports it too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any, Protocol

PLAIN, LOOKUP, ASSISTANT = "plain", "prompt lookup", "assistant"  # modes of `generate`: without speculation, and two that speculate
SPENT = 2.0  # seconds of one turn after which no repeat begins


@dataclass(frozen=True)
class Job:
    """What an engine measures; the same for all engines of a run except `options`. context: prompt tokens before the decoded tokens and
    before steps of many rows; tokens: tokens to generate; prefill: prompt tokens that are read at once; repeats: most repeats in a
    turn; stop: ids that end a text of `generate`."""

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
    stop: tuple[int, ...] = ()
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

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        """{"seconds": of the whole call, "tokens": the generated ids}. At most `tokens`, greedy, through the engine's own interface."""
        ...


def ended(tokens: Iterable[int], stop: Sequence[int], limit: int) -> list[int]:
    """The first `limit` tokens, up to and with the first that is in `stop`."""
    found: list[int] = []
    for token in islice(tokens, limit):
        found.append(token)
        if token in stop:
            break
    return found


def timed(run: Callable[[], float], repeats: int) -> float:
    """The median of the seconds that `run` returns, over up to `repeats` runs; fewer if they take long."""
    begun, found = time.perf_counter(), [run()]
    while len(found) < repeats and time.perf_counter() - begun < SPENT:
        found.append(run())
    return median(found)
