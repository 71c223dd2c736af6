"""Texts that arrive in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations

from redraft.serve.parsers.parser import Parser, Said

SHORT = 60  # characters up to which every pair of cuts is tried

Found = tuple[str, str, list[tuple[str, str]]]  # content, reasoning, (name, arguments) of each call


def read(make: Callable[[], Parser], pieces: Iterable[str]) -> Found:
    """What a new parser finds in these pieces. The parts of calls are checked too."""
    parser, whole = make(), Said()
    for said in [*map(parser.feed, pieces), parser.end()]:
        for part in said.calls:
            assert bool(part.name) == bool(part.id) == (part.index == len(whole.calls)), "the first part of a call has its name and id"
            whole.add(Said(calls=[part]))
        whole.add(Said(said.content, said.reasoning))
    assert len({call.id for call in whole.calls}) == len(whole.calls)
    return whole.content, whole.reasoning, [(call.name, call.arguments) for call in whole.calls]


def every_cut(make: Callable[[], Parser], text: str) -> Found:
    """What a parser finds in a text, however it is cut: as a whole, in characters, in two and, if it is short, in three."""
    found = read(make, [text])
    assert read(make, text) == found
    for number in (1, 2) if len(text) <= SHORT else (1,):
        for places in combinations(range(1, len(text)), number):
            pieces = [text[begin:end] for begin, end in zip((0, *places), (*places, len(text)), strict=True)]
            assert read(make, pieces) == found, pieces
    return found
