"""PEARL: draft and target work at the same time, each on its own device.

Tianyu Liu, Yun Li, Qitan Lv, Kai Liu, Jianchen Zhu, Winston Hu, Xiao Sun, PEARL: Parallel Speculative Decoding with Adaptive Draft
Length, 2024, arXiv 2408.11850.

1. Before: the draft writes a block while the target checks its first token. If that is rejected, the block is lost.
2. After: the target checks the rest of the block while the draft writes the next one, whose first token is checked too.
3. A step takes what the slower of both takes. Without a rejection the draft never waits.

Differs: simulated. Which drafted tokens the target accepts is given for each place in the text, so that all methods see the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple


class Run(NamedTuple):
    """places: the places of the text in the order in which their tokens were committed; seconds: until the last one."""

    places: list[int]
    seconds: float


Accepts = Seq[bool]
"""Of each place of the text: whether the target accepts what the draft proposes there, after the text so far."""


def plain(accepts: Accepts, target: Callable[[int], float]) -> Run:
    """One token a step. target: seconds of a step with so many rows."""
    return Run(list(range(len(accepts))), len(accepts) * target(1))


def speculative(accepts: Accepts, gamma: int, draft: float, target: Callable[[int], float]) -> Run:
    """The draft writes gamma tokens, then the target checks them and adds one. draft: seconds of a drafted token."""
    places: list[int] = []
    seconds, at = 0.0, 0
    while at < len(accepts):
        kept = _accepted(accepts, at, gamma)
        seconds += gamma * draft + target(gamma + 1)
        places += range(at, min(at + kept + 1, len(accepts)))
        at += kept + 1
    return Run(places, seconds)


def parallel(accepts: Accepts, gamma: int, draft: float, target: Callable[[int], float]) -> Run:
    """PEARL."""
    places: list[int] = []
    seconds, at, after = 0.0, 0, False
    while at < len(accepts):
        tests = gamma if after else 1  # 2.: gamma - 1 tokens of the block and the first of the next one; 1.: the first of the block
        seconds += max(gamma * draft, target(tests))  # 3.
        kept = _accepted(accepts, at, tests)
        after = kept == tests
        committed = kept if after else kept + 1  # a rejected token is replaced by the target's
        places += range(at, min(at + committed, len(accepts)))
        at += committed
    return Run(places, seconds)


def _accepted(accepts: Accepts, at: int, most: int) -> int:
    count = 0
    while count < most and at + count < len(accepts) and accepts[at + count]:
        count += 1
    return count
