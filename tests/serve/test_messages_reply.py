"""Replies with reasoning and calls in the form of the Messages interface, read by the official client. Their parts are made by hand."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import pytest
from pydantic import TypeAdapter

from redraft import SamplingParams
from redraft.core.sequence import FinishReason
from redraft.engine.output import Event, Stats
from redraft.serve.errors import Refused
from redraft.serve.messages_documents import MessageEvent, MessageReply
from redraft.serve.messages_reply import MessageWriter, form_of
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Wanted

CALLED = [
    Said(reasoning="Let me "),
    Said(reasoning="add."),
    Said(content="I add"),
    Said(content=".", calls=[CallPart(0, name="add", id="call_1")]),
    Said(calls=[CallPart(0, '{"a": 1, '), CallPart(0, '"b": [2, {"c": "é"}]}'), CallPart(1, "{", "now", "call_2")]),
    Said(calls=[CallPart(1, "}")]),
]
BLOCKS = [
    {"type": "thinking", "thinking": "Let me add.", "signature": "msg_1"},
    {"type": "text", "text": "I add."},
    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1, "b": [2, {"c": "é"}]}},
    {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
]


class Scripted:
    """A parser that gives the parts of a script, one for each event."""

    def __init__(self, parts: list[Said]) -> None:
        self.parts = iter(parts)

    def feed(self, text: str) -> Said:
        return next(self.parts)

    def end(self) -> Said:
        return Said()


def written(parts: list[Said], reason: FinishReason = FinishReason.STOP, stop: str | None = None, **more: Any) -> tuple[Any, bytes]:
    """(whole reply, bytes of the stream) of a text that its parser reads as these parts."""
    request: Any = SimpleNamespace(
        params=SamplingParams(max_tokens=len(parts), seed=1),
        prompt=[1, 2, 3],
        cached_tokens=2,
        admitted=None,
        reuse="",
        disk_tokens=0,
        disk_seconds=0.0,
    )
    submission: Any = SimpleNamespace(request=request, first=None, arrived=0.0, gaps=[])
    wanted = Wanted(id="msg_1", model="m", parser=lambda: Scripted(list(parts)))
    writer = MessageWriter(wanted, None, [submission], [""], **more)
    sent = [writer.begin()]
    for number in range(1, len(parts) + 1):
        last = number == len(parts)
        event = Event(request, 0, [7], "x", [False], [], reason if last else None, Stats(), stop=stop if last else None)
        sent.append(writer.chunk(writer.add(0, event)))
    return writer.whole(), b"".join([*sent, writer.finish()])


def read(stream: bytes) -> anthropic.types.Message:
    """What the official client makes of a stream."""

    def answer(_: Any) -> Any:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)

    transport = httpx2.MockTransport(answer)
    with (
        anthropic.Anthropic(api_key="none", http_client=httpx2.Client(transport=transport)) as client,
        client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "a"}]) as streamed,
    ):
        return streamed.get_final_message()


def events(stream: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]


def plain(message: Any) -> Any:
    kept = message if isinstance(message, dict) else message.to_dict()
    content = [{name: value for name, value in block.items() if value is not None} for block in kept["content"]]
    return content, kept["stop_reason"], kept["stop_sequence"], kept["usage"]


def test_reasoning_text_and_calls_are_blocks() -> None:
    whole, stream = written(CALLED)
    MessageReply.model_validate(whole, strict=True)
    usage = {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0, "output_tokens": 6}
    assert plain(whole) == (BLOCKS, "tool_use", None, usage)
    assert plain(read(stream)) == plain(whole)
    for event in events(stream):
        MessageEvent.model_validate(event, strict=True)
        TypeAdapter(anthropic.types.RawMessageStreamEvent).validate_python(event)


def test_each_block_begins_and_ends_once() -> None:
    _, stream = written(CALLED)
    kinds = [(event["type"], event["index"]) for event in events(stream) if "index" in event and "delta" not in event]
    assert kinds == [(kind, index) for index in range(4) for kind in ("content_block_start", "content_block_stop")]
    starts = [event["content_block"] for event in events(stream) if event["type"] == "content_block_start"]
    assert starts[2] == {"type": "tool_use", "id": "call_1", "name": "add", "input": {}} and starts[1] == {"type": "text", "text": ""}
    (signed,) = [event for event in events(stream) if event.get("delta", {}).get("type") == "signature_delta"]
    assert (signed["index"], signed["delta"]["signature"]) == (0, "msg_1")


@pytest.mark.parametrize("cuts", [*itertools.product([False, True], repeat=5)])
def test_blocks_do_not_depend_on_how_the_reply_was_cut(cuts: tuple[bool, ...]) -> None:
    joined = [CALLED[0]]
    for part, cut in zip(CALLED[1:], cuts, strict=True):
        if cut or (joined[-1].content and part.reasoning) or (joined[-1].calls and part.content):
            joined.append(part)
        else:
            joined[-1] = joined[-1].followed_by(part)
    whole, stream = written(joined)
    assert plain(whole)[0] == BLOCKS and plain(read(stream)) == plain(whole)


def test_text_after_a_call_is_a_block_of_its_own() -> None:
    parts = [Said("a", calls=[CallPart(0, "{}", "f", "c")]), Said("b")]
    whole, stream = written(parts)
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use", "text"]
    assert plain(read(stream)) == plain(whole)


@pytest.mark.parametrize(
    ("written_so_far", "read_as"), [("", {}), ('{"a": 1, "b": "x', {"a": 1}), ('{"a": [1, 2', {"a": [1, 2]}), ("[1]", {}), ("{]", {})]
)
def test_a_call_that_the_end_cuts_off(written_so_far: str, read_as: dict[str, Any]) -> None:
    whole, _ = written([Said(calls=[CallPart(0, written_so_far, "f", "c")])], FinishReason.LENGTH)
    assert whole["stop_reason"] == "max_tokens" and whole["content"][0]["input"] == read_as


@pytest.mark.parametrize(
    ("parts", "reason", "stop", "expected"),
    [
        ([Said("a")], FinishReason.STOP, None, ("end_turn", None)),
        ([Said("a")], FinishReason.STOP, "x", ("stop_sequence", "x")),
        (CALLED, FinishReason.STOP, None, ("tool_use", None)),
        (CALLED, FinishReason.LENGTH, None, ("max_tokens", None)),
        ([Said()], FinishReason.STOP, None, ("end_turn", None)),
    ],
)
def test_why_it_ended(parts: list[Said], reason: FinishReason, stop: str | None, expected: Any) -> None:
    whole, stream = written(parts, reason, stop)
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert plain(read(stream)) == plain(whole)


def test_thinking_that_is_not_shown() -> None:
    whole, stream = written(CALLED, shows=False)
    assert whole["content"] == [{**BLOCKS[0], "thinking": ""}, *BLOCKS[1:]]
    assert plain(read(stream)) == plain(whole) and b"Let me" not in stream


def test_an_error_names_its_field() -> None:
    found = form_of(Refused(400, "none was given", "prompt"))
    assert found == {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt: none was given"}, "request_id": None}
    assert form_of(Refused(429, "later"), "msg_1")["request_id"] == "msg_1"
