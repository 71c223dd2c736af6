"""Calls in the forms of DeepSeek V3 and V3.1, however the text is cut."""

from __future__ import annotations

import pytest

from redraft.serve.parsers.deepseek import DeepSeek
from tests.serve.parsers.cuts import every_cut

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALLS = [("weather", '{"place": "Oslo"}'), ("clock", "{}")]


def fenced(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def bare(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


@pytest.mark.parametrize("between", ["", "\n"])
@pytest.mark.parametrize("form", [fenced, bare])
def test_two_calls(form: object, between: str) -> None:
    assert callable(form)
    calls = between.join(form(name, arguments) for name, arguments in CALLS)
    assert every_cut(DeepSeek, f"{BEGIN}{calls}{END}") == ("", "", CALLS)
    assert every_cut(DeepSeek, f"I look.\n\n{BEGIN}{calls}{END}") == ("I look.", "", CALLS)
    assert every_cut(DeepSeek, calls) == ("", "", CALLS)
    assert every_cut(DeepSeek, f"{BEGIN}{calls}") == ("", "", CALLS)


def test_a_function_called_function() -> None:
    assert every_cut(DeepSeek, f"{BEGIN}{bare('function', '{}')}{END}") == ("", "", [("function", "{}")])


@pytest.mark.parametrize("text", [f"{BEGIN}none{END}", f"{BEGIN}{END}", BEGIN, f"{BEGIN}<｜tool▁call▁begin｜>weather", "< ｜tool"])
def test_what_is_no_call_is_content(text: str) -> None:
    assert every_cut(DeepSeek, text) == (text, "", [])


def test_arguments_that_are_no_json_end_with_the_mark() -> None:
    assert every_cut(DeepSeek, f"{BEGIN}{bare('f', '{]')}{END}")[2] == [("f", "{]")]
