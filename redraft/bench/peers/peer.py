"""What a measured engine is asked, and what it answers. Imports nothing heavy: whoever starts the engines reads it too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

SPENT = 2.0  # seconds after which nothing is measured once more in the same turn


@dataclass(frozen=True)
class Asked:
    """The same for all engines of a run but for `options`. context: tokens of the prompt that is decoded behind, and that steps of
    many rows stand behind; tokens: generated ones; prefill: tokens of the prompt that is read in one go; repeats: of a turn, at most."""

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
        """Places that a text of this run takes at most."""
        return max(self.context + max(self.tokens, *self.rows), self.prefill) + 1

    def prompt(self, length: int) -> list[int]:
        """Random ids, the same for all engines; a shorter one is the start of a longer one."""
        draw = random.Random(self.seed)
        return [draw.randrange(self.vocab) for _ in range(length)]


class Peer(Protocol):
    """One loaded engine, made from Asked. facts: what it is, for the report (version, dtype ...); does: which of the measurements
    below it has. Each returns JSON."""

    facts: dict[str, Any]
    does: tuple[str, ...]

    def __init__(self, asked: Asked) -> None: ...

    def decode(self) -> dict[str, Any]:
        """{"seconds": of each generated token behind the first, "tokens": all generated ids}, greedy, no end of text."""
        ...

    def prefill(self) -> dict[str, Any]:
        """{"seconds": of a prompt of `prefill` tokens up to its next token}"""
        ...

    def steps(self) -> dict[str, Any]:
        """{"seconds": {rows: of one forward over so many rows behind the context, with the likeliest token behind every row}}"""
        ...


def timed(run: Callable[[], float], repeats: int) -> float:
    """The median of what `run` returns, seconds, over up to `repeats` runs; fewer where they take long."""
    begun, found = time.perf_counter(), [run()]
    while len(found) < repeats and time.perf_counter() - begun < SPENT:
        found.append(run())
    return median(found)
