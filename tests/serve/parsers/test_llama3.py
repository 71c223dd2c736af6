"""Calls in the form of Llama 3, however the text is cut."""

from __future__ import annotations

import pytest

from redraft.serve.parsers.llama3 import Llama3
from tests.serve.parsers.cuts import every_cut

ONE, TWO = '{"name": "weather", "parameters": {"place": "Oslo"}}', '{"name": "clock", "parameters": {}}'
CALLS = [("weather", '{"place": "Oslo"}'), ("clock", "{}")]


@pytest.mark.parametrize("text", [ONE, f" \n{ONE}\n", f"<|python_tag|>{ONE}", f"<|python_tag|> {ONE}"])
def test_one_call(text: str) -> None:
    assert every_cut(Llama3, text) == ("", "", CALLS[:1])


@pytest.mark.parametrize("between", [";", "; ", " ;\n", "\n", "<|python_tag|>"])
def test_several_calls(between: str) -> None:
    assert every_cut(Llama3, f"{ONE}{between}{TWO}") == ("", "", CALLS)


def test_the_type_of_a_call_may_come_first() -> None:
    assert every_cut(Llama3, '{"type": "function", "name": "clock", "parameters": {}}') == ("", "", CALLS[1:])


def test_a_call_within_a_text_needs_the_mark() -> None:
    assert every_cut(Llama3, f"I look. {ONE}") == (f"I look. {ONE}", "", [])
    assert every_cut(Llama3, f"I look. <|python_tag|>{ONE}") == ("I look.", "", CALLS[:1])


@pytest.mark.parametrize("text", ['{"answer": 5}', "{", "{}", '{"name": "f"', "<|python_tag|>print(5)", "{{ x }}", " [1] ", f"{{x}} {ONE}"])
def test_what_is_no_call_is_content(text: str) -> None:
    assert every_cut(Llama3, text) == (text, "", [])


def test_text_after_a_call() -> None:
    assert every_cut(Llama3, f"{TWO} so.") == (" so.", "", CALLS[1:])
    assert every_cut(Llama3, f"{TWO}; so.") == ("; so.", "", CALLS[1:])
