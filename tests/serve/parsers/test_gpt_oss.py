"""Replies in the Harmony format, however the text is cut."""

from __future__ import annotations

import pytest

from redraft.serve.parsers.chain import Chain
from redraft.serve.parsers.gpt_oss import Harmony, HarmonyCalls
from tests.serve.parsers.cuts import every_cut

THOUGHT = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
CALL = [("weather", '{"place": "Oslo"}')]


def both() -> Chain:
    return Chain(Harmony(False), HarmonyCalls())


def alone() -> Harmony:
    return Harmony(False)


@pytest.mark.parametrize("make", [both, alone])
def test_reasoning_and_answer(make: object) -> None:
    assert callable(make)
    assert every_cut(make, f"{THOUGHT}<|channel|>final<|message|>Cold. ") == ("Cold. ", "Look it up.", [])
    assert every_cut(make, "<|channel|>final<|message|>Cold.<|end|>") == ("Cold.", "", [])
    assert every_cut(make, "<|channel|>analysis<|message|>Look") == ("", "Look", [])
    twice = f"{THOUGHT}{THOUGHT}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>Cold."
    assert every_cut(make, twice) == ("I look.\nCold.", "Look it up.\nLook it up.", [])


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.weather<|constrain|>json<|message|>\n",
        "<|channel|>commentary to=functions.weather json<|message|>",
        "<|channel|>analysis to=functions.weather <|constrain|>json<|message|>",
        " to=functions.weather<|channel|>commentary json<|message|>",
        "<|channel|> to=functions.weather <|constrain|>json<|message|>",
    ],
)
def test_a_call(header: str) -> None:
    text = f'{header}{{"place": "Oslo"}}<|call|>'
    assert every_cut(both, text) == ("", "", CALL)
    assert every_cut(both, THOUGHT + text) == ("", "Look it up.", CALL)
    assert every_cut(both, text.removesuffix("<|call|>")) == ("", "", CALL)


def test_without_a_parser_of_calls_a_call_stays_in_the_content() -> None:
    text = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'
    assert every_cut(alone, THOUGHT + text) == (text, "Look it up.", [])


def test_a_text_without_channels_is_the_content() -> None:
    for text in ("Cold.", "", "a <| b"):
        assert every_cut(both, text) == (text, "", [])
    assert every_cut(both, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>none<|call|>")[2] == []
