"""Colours never change a text, and each character has the colour of the token that completed it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.cli.stream import Colours
from redraft.engine.output import Stats
from redraft.engine.text import PartialText
from redraft.models.tokenizer import Decoder
from redraft.outputs import Delta


def utf8(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def delta(text: str, ids: list[int], drafted: list[bool]) -> Delta:
    return Delta(0, 0, text, ids, drafted, [], None, Stats())


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=12), st.data())
def test_each_byte_a_token(text: str, data: st.DataObject) -> None:
    """Steps of any size. The text lags by any amount, as it does if a stop string is held back."""
    ids = list(text.encode())
    drafted = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    colours, found, first, sent = Colours([65] * 9, Decoder(utf8)), [], 0, 0
    reader, tokens = PartialText.start([65] * 9, Decoder(utf8)), [65] * 9
    while first < len(ids):
        size = data.draw(st.integers(1, 5))
        tokens += ids[first : first + size]
        last = first + size >= len(ids)
        reader = reader.extend(tokens, Decoder(utf8), last=last)
        end = len(reader.done) if last else data.draw(st.integers(sent, len(reader.done)))
        found += colours.split(delta(reader.done[sent:end], ids[first : first + size], drafted[first : first + size]))
        first, sent = first + size, end
    assert "".join(piece for piece, _ in found) == text
    expected, at = [], 0
    for character in text:
        at += len(character.encode())
        expected.append(drafted[at - 1])
    assert [flag for piece, flag in found for _ in piece] == expected


def test_what_never_becomes_whole_is_still_shown() -> None:
    colours = Colours([65], Decoder(utf8))
    assert colours.split(delta("", [0xE2], [True])) == []
    assert colours.split(delta("\N{REPLACEMENT CHARACTER}", [0x82], [False])) == [("\N{REPLACEMENT CHARACTER}", False)]
