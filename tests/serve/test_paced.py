"""Pieces of a stream are passed on as they arrive, with comments in between, until a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import monotonic
from typing import Any

import pytest

from redraft.serve.errors import Refused
from redraft.serve.stream import paced

FAR = 3600.0
SILENCE = object()


class Source:
    """Yields pieces, sleeps for numbers among them, waits at SILENCE until it was reported, raises exceptions. ended: it was closed."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces, self.ended, self.reported = pieces, False, asyncio.Event()

    async def stream(self) -> AsyncIterator[str]:
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                elif piece is SILENCE:
                    await self.reported.wait()
                else:
                    yield piece
        finally:
            self.ended = True


def received(source: Source, every: float = FAR, deadline: float = FAR, most: int = 99) -> list[str | None]:
    async def run() -> list[str | None]:
        found: list[str | None] = []
        async with aclosing(paced(source.stream(), every, monotonic() + deadline)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                found.append(piece)
                if piece is None:
                    source.reported.set()
                if len(found) == most:
                    break
        assert source.ended, "left running"
        return found

    return asyncio.run(run())


def test_all_pieces_come_in_order() -> None:
    assert received(Source("a", "b", 0.01, "c")) == ["a", "b", "c"]


def test_silence_is_reported_and_loses_nothing() -> None:
    found = received(Source("a", SILENCE, "b", "c"), every=0.05)
    assert [piece for piece in found if piece] == ["a", "b", "c"] and None in found


def test_the_deadline_ends_it() -> None:
    source = Source("a", FAR)
    with pytest.raises(Refused) as refused:
        received(source, every=0.02, deadline=0.05)
    assert refused.value.status == 504 and source.ended


def test_errors_of_the_source_pass_behind_what_came_before() -> None:
    source = Source("a", ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        received(source)
    assert received(Source("a", ValueError("broken")), most=1) == ["a"]


def test_who_leaves_ends_the_source() -> None:
    assert received(Source("a", FAR, "b"), most=1) == ["a"]
