"""What stands around the parsers: special tokens that are taken out, and one call instead of several."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft import registry
from redraft.serve.parsers.chain import Chain, Single, Unspecial
from redraft.serve.parsers.hermes import Hermes
from redraft.serve.parsers.parser import Parser
from tests.serve.parsers.cuts import every_cut, read

PIECES = [
    "<think>", "</think>", "[THINK]", "[/THINK]",
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"a": "b"}', "}}",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "function",
    "\n```json\n", "\n```",
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "assistant", "analysis", "commentary to=functions.f ",
    "{", "}", "[", "]", '"', "\\", ",", ";", " ", "\n", "x", "<", "f",
]  # fmt: skip
TOOLS = {name: registry.load(target) for name, target in registry.TOOL_PARSERS.items()}
REASONING = {name: registry.load(target) for name, target in registry.REASONING_PARSERS.items()}


@pytest.mark.parametrize("tools", TOOLS)
def test_text_between_arguments_and_the_bracket_is_content(tools: str) -> None:
    """However it is cut, the bracket after it ends no call."""
    every_cut(TOOLS[tools], '{"name": "f", "arguments": {}x}}')


@pytest.mark.parametrize("reasoning", [None, *REASONING])
@pytest.mark.parametrize("tools", TOOLS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_no_text_breaks_a_parser_nor_depends_on_how_it_is_cut(tools: str, reasoning: str | None, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=14)))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[begin:end] for begin, end in zip((0, *places), (*places, len(text)), strict=True)]

    def make() -> Parser:
        made: Parser = TOOLS[tools]()
        return made if reasoning is None else Chain(REASONING[reasoning](False), made)

    found = read(make, [text])
    assert read(make, pieces) == read(make, text) == found
    if reasoning is None and not found[2]:
        assert found[0] == text, "a text without calls is the content"


def test_one_call_of_several() -> None:
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert every_cut(lambda: Single(Hermes()), one + one.replace("f", "g") + "so") == ("so", "", [("f", "{}")])


def test_special_tokens_are_taken_out_however_the_text_is_cut() -> None:
    text = "a<s></s>b </s"
    for places in combinations(range(len(text) + 1), 2):
        unspecial = Unspecial({1: "<s>", 2: "</s>"})
        pieces = [text[begin:end] for begin, end in zip((0, *places), (*places, len(text)), strict=True)]
        tokens = [[5, 1, 2], [], [6]]  # a token never comes after its text
        assert "".join(unspecial.feed(*one, last=one[1] == [6]) for one in zip(pieces, tokens, strict=True)) == "ab </s"


def test_what_only_looks_like_a_special_token_stays() -> None:
    unspecial = Unspecial({1: "<s>", 2: "</s>"})
    assert unspecial.feed("<s>a", [7], last=False) == "<s>a"
    assert unspecial.feed("<s></s>b", [1, 2], last=False) == "b"
    assert unspecial.feed("</s>", [8], last=True) == "</s>"


def test_a_special_token_whose_text_comes_later() -> None:
    unspecial = Unspecial({2: "</s>"})
    assert unspecial.feed("a<", [2], last=False) == "a"
    assert unspecial.feed("/s>b", [], last=False) == "b"
    assert unspecial.feed("<", [], last=False) == "<"
