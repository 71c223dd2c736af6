"""Items of the Responses API: from requests, as they are stored, and as messages of a conversation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redraft.serve.errors import Refused
from redraft.serve.responses_schema import CallItem, MessageItem, ReasoningItem, ResultItem
from redraft.serve.schema import MESSAGES, TOOL_CALLS

PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}  # of ids


def name(kind: str, of: str) -> str:
    """The id of an item. of: what is unique to it."""
    return f"{PREFIXES[kind]}_{of}"


def text_part(text: str, logprobs: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """A text of the assistant."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def given(items: Iterable[MessageItem | CallItem | ResultItem | ReasoningItem], of: str) -> list[dict[str, Any]]:
    """The items of a request as they are stored and listed, with ids of their own. of: what is unique to the request."""
    found = []
    for number, item in enumerate(items):
        match item:
            case MessageItem(role="assistant"):
                kind, more = "message", {"role": "assistant", "content": [text_part(item.text)]}
            case MessageItem():
                kind, more = "message", {"role": item.role, "content": [{"type": "input_text", "text": item.text}]}
            case CallItem():
                kind, more = "function_call", {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            case ResultItem():
                kind, more = "function_call_output", {"call_id": item.call_id, "output": item.text}
            case ReasoningItem():
                kind, more = "reasoning", {"summary": [], "content": [{"type": "reasoning_text", "text": item.text}]}
        found.append({"type": kind, "id": name(kind, f"{of}i{number}"), "status": "completed", **more})
    return found


def messages(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored items as the messages of a conversation. What the assistant thinks, says and calls in one turn is one message."""
    found: list[dict[str, Any]] = []
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif kind == "message" and item["role"] != "assistant":
            found.append({"role": item["role"], "content": _text(item)})
        else:
            _join(found, item)
    if len(found) > MESSAGES:
        raise Refused(400, f"input: the conversation has {len(found)} messages: at most {MESSAGES} are allowed", "input")
    return found


def _join(found: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Adds an item of the assistant to its last message, or to a new one if that one cannot continue with it."""
    order = {"reasoning": ("content", "tool_calls"), "message": ("content", "tool_calls"), "function_call": ()}
    kind = item["type"]
    last = found[-1] if found and found[-1]["role"] == "assistant" else None
    if last is None or any(last.get(field) is not None for field in order[kind]):
        found.append(last := {"role": "assistant"})
    if kind == "reasoning":
        last["reasoning_content"] = last.get("reasoning_content", "") + _text(item)
    elif kind == "message":
        last["content"] = _text(item)
    else:
        calls = last.setdefault("tool_calls", [])
        if len(calls) == TOOL_CALLS:
            raise Refused(400, f"input: more than {TOOL_CALLS} calls in one turn", "input")
        function = {"name": item["name"], "arguments": item["arguments"]}
        calls.append({"id": item["call_id"], "type": "function", "function": function})


def _text(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"])
