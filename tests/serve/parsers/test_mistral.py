"""Calls in both forms of Mistral, however the text is cut."""

from __future__ import annotations

import re

import pytest

from redraft.serve.parsers.mistral import Mistral
from tests.serve.parsers.cuts import every_cut

CALLS = [("weather", '{"place": "Oslo"}'), ("clock", "{}")]


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Oslo"}}, {"name": "clock", "arguments": {}}]',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Oslo"}, "id": "a1b2c3d4e"},{"name": "clock", "arguments": {}}]\n',
        '[TOOL_CALLS]weather[ARGS]{"place": "Oslo"}[TOOL_CALLS]clock[ARGS]{}',
        '[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"place": "Oslo"}[TOOL_CALLS]clock[CALL_ID]a1b2c3d4f[ARGS]{}',
        '[TOOL_CALLS]weather{"place": "Oslo"}\n[TOOL_CALLS]clock {}',
    ],
)
def test_two_calls(text: str) -> None:
    assert every_cut(Mistral, text) == ("", "", CALLS)
    assert every_cut(Mistral, f"I look.{text}") == ("I look.", "", CALLS)


def test_the_ids_that_its_templates_need() -> None:
    said = Mistral().feed("[TOOL_CALLS]clock[ARGS]{}")
    assert re.fullmatch("[A-Za-z0-9]{9}", said.calls[0].id)


@pytest.mark.parametrize(
    "text", ["[TOOL_CALLS][]", "[TOOL_CALLS]", "[TOOL_CALLS] none of them", '[TOOL_CALLS][{"a": 1}]', "[TOOL] [ARGS]{}", "[1]"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert every_cut(Mistral, text) == (text, "", [])


def test_a_list_that_ends_early() -> None:
    assert every_cut(Mistral, '[TOOL_CALLS][{"name": "clock", "arguments": {}}') == ("", "", CALLS[1:])
    assert every_cut(Mistral, '[TOOL_CALLS][{"name": "clock", "arguments": {}}, x]') == (", x]", "", CALLS[1:])
