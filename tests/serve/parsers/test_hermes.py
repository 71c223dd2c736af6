"""Calls in the form of Hermes, however the text is cut."""

from __future__ import annotations

import re

import pytest

from redraft.serve.parsers.hermes import Hermes
from tests.serve.parsers.cuts import every_cut, read

ONE = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
CALLS = [("weather", '{"place": "Oslo"}'), ("clock", "{}")]


def test_calls() -> None:
    assert every_cut(Hermes, ONE) == ("", "", CALLS[:1])
    assert every_cut(Hermes, f"{ONE}\n{TWO}") == ("", "", CALLS)
    assert every_cut(Hermes, f"I look.\n{ONE}\n") == ("I look.", "", CALLS[:1])
    assert every_cut(Hermes, f"{TWO}\n\nDone.") == ("\n\nDone.", "", CALLS[1:])


def test_a_text_without_calls_is_the_content() -> None:
    for text in ("", " a < b\n", "a <tool b", "<tool_response>", "ends in <tool_ca"):
        assert every_cut(Hermes, text) == (text, "", [])


def test_arguments_are_sent_while_they_arrive() -> None:
    parser = Hermes()
    said = parser.feed('<tool_call>{"name": "f", "arguments": {"a": "b')
    assert [(part.name, part.arguments) for part in said.calls] == [("f", ""), ("", '{"a": "b')] or said.calls[0].arguments == '{"a": "b'
    assert parser.feed("c").calls[0].arguments == "c"
    assert parser.feed('"}}').calls[0].arguments == '"}'
    assert re.fullmatch(r"call_[0-9a-f]{24}", said.calls[0].id)


def test_marks_and_brackets_within_a_string_are_text() -> None:
    arguments = r'{"text": "</tool_call> } \" ]", "list": [{"a": [1, 2]}]}'
    assert every_cut(Hermes, f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>.') == (".", "", [("f", arguments)])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}}', ("f", '{"a": 1}')),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ("f", '{"a": 1}')),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": {"a": 1}, "id": "x"}', ("f", '{"a": 1}')),
        ('{ "type": "function", "name":"f" ,"arguments" : {"a":1} }', ("f", '{"a":1}')),
        ('{"name": "caf\\u00e9", "arguments": {}}', ("café", "{}")),
    ],
)
def test_spellings_of_a_call(call: str, expected: tuple[str, str]) -> None:
    assert every_cut(Hermes, f"<tool_call>{call}</tool_call>") == ("", "", [expected])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>weather(Oslo)</tool_call>",
        '<tool_call>{"place": "Oslo"}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 1]',
        '<tool_call>{"name": "f", "arg',
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert every_cut(Hermes, text) == (text, "", [])
    assert every_cut(Hermes, f"{text} then {TWO}")[2] in ([CALLS[1]], [])


def test_a_call_after_what_is_none() -> None:
    assert every_cut(Hermes, f"<tool_call>no<tool_call>{{}}{TWO}") == ("<tool_call>no<tool_call>{}", "", CALLS[1:])


def test_a_call_without_its_last_mark() -> None:
    text = ONE.removesuffix("\n</tool_call>")
    assert every_cut(Hermes, text) == ("", "", CALLS[:1])
    assert every_cut(Hermes, f"{text}\n{TWO}") == ("", "", CALLS)
    assert every_cut(Hermes, ONE.replace("}}", "}") + f"\n{TWO}") == ("", "", CALLS)
    assert every_cut(Hermes, text[:-6]) == ("", "", [("weather", '{"place": "O')])


def test_arguments_that_are_no_json_end_with_the_mark() -> None:
    assert every_cut(Hermes, '<tool_call>{"name": "f", "arguments": {"a": [1}}}</tool_call>z') == ("z", "", [("f", '{"a": [1}}}')])


def test_arguments_are_never_half_of_a_surrogate_pair() -> None:
    text = '<tool_call>{"arguments": {"a": "\\ud800é"}, "name": "f"}</tool_call>'
    assert every_cut(Hermes, text) == ("", "", [("f", '{"a": "\\ud800\\u00e9"}')])


@pytest.mark.parametrize("begin", ['{"name": "f", "arguments": ', '{"arguments": '])
def test_arguments_that_are_very_deep(begin: str) -> None:
    text = f'<tool_call>{begin}{{"a": {"[" * 5000}{"]" * 5000}}}, "name": "f"}}</tool_call>'
    content, _, calls = read(Hermes, [text])
    assert (content, len(calls)) == (("", 1) if begin.startswith('{"name') else (text, 0))


def test_a_long_head_is_not_read_again_and_again() -> None:
    text = '<tool_call>{"name": "' + "a" * 20_000
    assert read(Hermes, text) == (text, "", [])
