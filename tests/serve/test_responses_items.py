"""Items as messages of a conversation."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from redraft.serve.errors import Refused
from redraft.serve.responses_items import given, messages
from redraft.serve.responses_schema import InputItem
from redraft.serve.schema import Message

ITEMS: Any = TypeAdapter(list[InputItem])
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
PLAIN = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "21"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([said("a", "user"), said("b", "developer")], [said("a", "user"), said("b", "developer")]),
        (
            [THOUGHT, said("a"), CALL, {**CALL, "call_id": "c2"}, RESULT],
            [
                {"role": "assistant", "reasoning_content": "hm", "content": "a", "tool_calls": [PLAIN, {**PLAIN, "id": "c2"}]},
                {"role": "tool", "tool_call_id": "c1", "content": "21"},
            ],
        ),
        ([CALL, said("a")], [{"role": "assistant", "tool_calls": [PLAIN]}, said("a")]),
        ([said("a"), said("b")], [said("a"), said("b")]),
        ([said("a"), THOUGHT], [said("a"), {"role": "assistant", "reasoning_content": "hm"}]),
        ([THOUGHT, THOUGHT, said("a")], [{"role": "assistant", "reasoning_content": "hmhm", "content": "a"}]),
        ([said("a", "user"), CALL], [said("a", "user"), {"role": "assistant", "tool_calls": [PLAIN]}]),
        ([said(""), CALL], [{"role": "assistant", "content": "", "tool_calls": [PLAIN]}]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}], [{"role": "assistant", "reasoning_content": "so"}]),
        ([{**RESULT, "output": [{"type": "input_text", "text": "2"}, {"type": "input_text", "text": "1"}]}],
         [{"role": "tool", "tool_call_id": "c1", "content": "21"}]),
        ([said([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}], "user")], [said("ab", "user")]),  # type: ignore[arg-type]
        ([{**said([{"type": "output_text", "text": "a", "annotations": [], "logprobs": [], "parsed": None}]),  # type: ignore[arg-type]
           "type": "message", "id": "msg_1", "status": "completed", "phase": None}], [said("a")]),
    ],
)  # fmt: skip
def test_what_the_assistant_does_in_one_turn_is_one_message(items: Any, expected: Any) -> None:
    found = messages(given(ITEMS.validate_python(items), "x"))
    assert found == expected
    for message in found:
        Message.model_validate(message)


def test_items_get_ids_of_their_own() -> None:
    found = given(ITEMS.validate_python([{**CALL, "id": "same"}, {**CALL, "id": "same"}, RESULT, said("a"), THOUGHT]), "x")
    assert [item["id"] for item in found] == ["fc_xi0", "fc_xi1", "fco_xi2", "msg_xi3", "rs_xi4"]
    assert {item["status"] for item in found} == {"completed"}


def test_a_turn_has_a_limited_number_of_calls() -> None:
    with pytest.raises(Refused, match="more than 128 calls"):
        messages(given(ITEMS.validate_python([CALL] * 129), "x"))
