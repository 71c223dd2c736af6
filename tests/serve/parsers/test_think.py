"""Reasoning between marks, however the text is cut."""

from __future__ import annotations

from functools import partial

import pytest

from redraft.serve.parsers.chain import Chain
from redraft.serve.parsers.hermes import Hermes
from redraft.serve.parsers.magistral import Magistral
from redraft.serve.parsers.think import Think
from tests.serve.parsers.cuts import every_cut

begun, fresh = partial(Think, True), partial(Think, False)


def test_reasoning_then_content() -> None:
    assert every_cut(fresh, "<think>\nIt is\n\ncold.\n</think>\n\nYes. ") == ("Yes. ", "It is\n\ncold.", [])
    assert every_cut(fresh, "\n<think>cold</think>Yes.") == ("Yes.", "cold", [])
    assert every_cut(fresh, "<think>\n\n</think>\n\nYes.") == ("Yes.", "", [])


def test_the_prompt_has_the_first_mark() -> None:
    assert every_cut(begun, "It is cold.\n</think>\n\nYes.") == ("Yes.", "It is cold.", [])
    assert every_cut(begun, "<think>It is cold.</think>Yes.") == ("Yes.", "It is cold.", [])
    assert every_cut(begun, "</think>Yes.") == ("Yes.", "", [])


def test_reasoning_that_does_not_end() -> None:
    assert every_cut(begun, "It is </thin") == ("", "It is </thin", [])
    assert every_cut(fresh, "<think>It is ") == ("", "It is", [])
    assert every_cut(begun, "") == ("", "", [])


def test_a_text_without_reasoning_is_the_content() -> None:
    for text in ("Yes.", " a < b", "<thin", "<b>", "So <think>x</think>", "x</think>"):
        assert every_cut(fresh, text) == (text, "", [])


def test_other_marks() -> None:
    assert every_cut(partial(Magistral, False), "[THINK]cold[/THINK]Yes.") == ("Yes.", "cold", [])


def test_calls_after_reasoning() -> None:
    def make() -> Chain:
        return Chain(Think(False), Hermes())

    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert every_cut(make, f"<think>\nuse <tool_call>\n</think>\n\n{call}") == ("", "use <tool_call>", [("f", "{}")])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a<think>\n", True), ("a<think>", True), ("a", False), ("a<think>\n\n</think>\n\n", None), ("<think>a", False)],
)
def test_what_the_prompt_has_begun(prompt: str, expected: bool | None) -> None:
    assert Think.opened(prompt) is expected
