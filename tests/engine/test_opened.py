"""Opened methods are bounded in number and in memory. A method that a live text uses is not closed."""

from __future__ import annotations

from typing import Any

import pytest

from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.opened import Opened
from redraft.errors import InvalidInput, OutOfMemory
from tests.contracts import plain
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT


class Part:
    def __init__(self, amount: int) -> None:
        self.bytes = amount


def opened(used: list[Part], **bounds: int) -> Opened:
    return Opened(lambda: used, **bounds)


def test_the_one_unused_longest_is_closed() -> None:
    used: list[Part] = []
    made = opened(used, max_count=2)
    first, second = made.get("a", "a", lambda: Part(0)), made.get("b", "b", lambda: Part(0))
    assert made.get("a", "a", lambda: Part(0)) is first
    made.get("c", "c", lambda: Part(0))
    assert made.count == 2 and made.get("a", "a", lambda: Part(0)) is first
    assert made.get("b", "b", lambda: Part(0)) is not second


def test_what_is_used_stays_and_is_counted() -> None:
    used = [Part(60)]
    made = opened(used, max_count=1, max_bytes=100)
    assert made.get("a", "a", lambda: used[0], 60) is used[0]
    with pytest.raises(OutOfMemory, match="methods in use hold") as refused:
        made.get("b", "b", lambda: Part(50), 50)
    assert "\n" not in str(refused.value) and made.count == 1 and made.bytes == 60
    other = made.get("c", "c", lambda: Part(30), 30)
    assert made.count == 2, "both are in use or requested"
    assert made.get("a", "a", lambda: Part(1)) is used[0] and made.count == 1, "the other is unused"
    used.clear()
    assert made.get("b", "b", lambda: Part(50), 50).bytes == 50 and made.bytes == 50 and other.bytes == 30


def test_what_never_fits_is_refused_before_it_is_made() -> None:
    made, calls = opened([], max_bytes=100), []

    def make() -> Part:
        calls.append(1)
        return Part(101)

    for needs in (101, 0):  # 0: unknown
        with pytest.raises(InvalidInput, match=r"^draft = x: may need 0 KiB; the limit for methods that requests choose is 0 KiB$"):
            made.get("draft = x", "x", make, needs)
        assert len(calls) == (needs == 0) and made.count == made.bytes == 0


def test_what_grows_pushes_out_what_nobody_uses() -> None:
    made = opened([], max_bytes=100)
    first, second = made.get("a", "a", lambda: Part(10)), made.get("b", "b", lambda: Part(10))
    second.bytes = 95
    assert made.get("b", "b", lambda: Part(0)) is second and made.count == 1
    assert made.get("a", "a", lambda: Part(5)) is not first


def ask(i: int, draft: str) -> Request:
    return Request(str(i), list(PROMPT), SamplingParams(temperature=0, max_tokens=3, draft=draft))


def test_ever_new_spellings_cost_no_memory() -> None:
    made = engine()
    table = 4 * 8 * plain.VOCAB
    for i in range(1, 8):
        made.add(ask(i, "union:parts=" + "+".join(["union"] * (30 - i % 2)) + " " * i))
        while made.has_work:
            made.step()
    assert made.opened.count == 2 and made.opened.bytes == (29 + 30) * table


def test_a_drafter_that_is_too_large_is_refused() -> None:
    made = engine()
    made.opened.max_bytes = 100 * 4 * 8 * plain.VOCAB
    large: dict[str, Any] = {"union of unions": "union:parts=" + "+".join(["(union:parts=union+union)"] * 51), "aded": "aded:keys=1000000"}
    for draft in large.values():
        with pytest.raises(InvalidInput, match=r"^draft = .*: may need") as refused:
            made.add(ask(0, draft))
        assert "\n" not in str(refused.value) and made.opened.count == 0 and not made.has_work
    made.add(ask(1, "union:parts=" + "+".join(["union"] * 60)))
    with pytest.raises(OutOfMemory, match="methods in use hold"):
        made.add(ask(2, "union:parts=" + "+".join(["union"] * 50)))
    while made.has_work:
        assert not any(event.error for event in made.step())
    made.add(ask(3, "union:parts=" + "+".join(["union"] * 50)))
    assert made.opened.count == 1
