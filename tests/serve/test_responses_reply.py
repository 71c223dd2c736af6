"""The events and items of replies with reasoning and calls, made by hand, against the client's types."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from redraft import SamplingParams
from redraft.core.distribution import TopLogprobs
from redraft.core.sequence import FinishReason, Request
from redraft.engine.output import Event, Stats
from redraft.serve import responses_documents as documents
from redraft.serve.errors import Refused
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Wanted
from redraft.serve.responses_reply import ResponseWriter
from redraft.serve.responses_schema import ResponseRequest
from redraft.serve.shell import Submission
from tests.serve.raw import embedded

EVENT: Any = TypeAdapter(ResponseStreamEvent)
FIRST, SECOND = CallPart(0, name="f", id="call_0"), CallPart(1, name="g", id="call_1")
THOUGHT, TEXT = Said(reasoning="hm"), Said("So")
SAID = [
    [THOUGHT, Said(reasoning="m"), TEXT, Said(" be it"), Said(calls=[FIRST]), Said(calls=[CallPart(0, '{"x"')]),
     Said(calls=[CallPart(0, ": 1}"), SECOND, CallPart(1, "{}")])],
    [Said("So", "hmm"), Said(" be it", calls=[FIRST, CallPart(0, '{"x": 1}'), SECOND, CallPart(1, "{}")])],
    [Said("So be it", "hmm", [FIRST, CallPart(0, '{"x": 1}'), SECOND, CallPart(1, "{}")])],
]  # fmt: skip


class Scripted:
    """A parser that finds these parts, one in each event."""

    def __init__(self, parts: list[Said]) -> None:
        self.parts = [Said(part.content, part.reasoning, list(part.calls)) for part in parts]

    def feed(self, text: str) -> Said:
        return self.parts.pop(0)

    def end(self) -> Said:
        return Said()


def replied(
    parts: list[Said],
    reason: FinishReason = FinishReason.STOP,
    *,
    stream: bool = True,
    error: Refused | None = None,
    logprobs: bool = False,
) -> Any:
    """(events, kept responses) of a reply; or the whole reply. Each part has one token."""
    request = Request("r", [1, 2, 3], SamplingParams(temperature=0, top_p=0.9, logprobs=1, seed=3))
    asked, kept = ResponseRequest(input="hi", stream=stream), []
    wanted = Wanted(id="resp_1", model="m", logprobs=1 if logprobs else None, parser=partial(Scripted, parts))
    writer = ResponseWriter(asked, kept.append, wanted, embedded().tokenizer, [Submission(request)], [""])
    sent = writer.begin()
    for number, _ in enumerate(parts, 5):
        last = reason if number == len(parts) + 4 and error is None else None
        writer_event = Event(request, 0, [number], "x", [False], [TopLogprobs(number, -1.0, 1, ((number, -1.0),))], last, Stats())
        sent += writer.chunk(writer.add(0, writer_event))
    if not stream:
        return writer.whole()
    sent += writer.finish() if error is None else writer.failed(error)
    blocks = [block.split("\n") for block in sent.decode().split("\n\n") if block]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    for event in events:
        EVENT.validate_python(event)
        documents.ResponseEvent.model_validate(event, strict=True)
    return events, kept


@pytest.mark.parametrize("parts", SAID)
def test_reasoning_text_and_calls_are_items(parts: list[Said]) -> None:
    events, kept = replied(parts)
    response = events[-1]["response"]
    assert kept == [response] and response["status"] == "completed"
    reasoning, message, first, second = response["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "hmm"}])
    assert (message["type"], message["content"][0]["text"]) == ("message", "So be it")
    assert (first["type"], first["call_id"], first["name"], first["arguments"]) == ("function_call", "call_0", "f", '{"x": 1}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("call_1", "g", "{}")
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert len({item["id"] for item in response["output"]}) == 4
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    whole = replied(parts, stream=False)
    Response.model_validate(whole)
    assert whole["output"] == response["output"]


@pytest.mark.parametrize("parts", SAID)
def test_events_of_an_item_surround_its_parts(parts: list[Said]) -> None:
    events, _ = replied(parts)
    for place, item in enumerate(events[-1]["response"]["output"]):
        own = [event for event in events if event.get("output_index") == place]
        assert own == events[events.index(own[0]) : events.index(own[0]) + len(own)]  # one item after the other
        kinds = [event["type"].removeprefix("response.") for event in own]
        assert (kinds[0], kinds[-1], own[-1]["item"]) == ("output_item.added", "output_item.done", item)
        assert own[0]["item"]["status"] == "in_progress"
        name = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}[item["type"]]
        inner = kinds[1:-1] if item["type"] == "function_call" else kinds[2:-2]
        assert inner == [f"{name}.delta"] * (len(inner) - 1) + [f"{name}.done"]
        done = own[-2 if item["type"] == "function_call" else -3]
        assert "".join(event.get("delta", "") for event in own) == done.get("text", done.get("arguments"))
        if item["type"] != "function_call":
            assert (kinds[1], kinds[-2], own[-2]["part"]) == ("content_part.added", "content_part.done", item["content"][0])


@pytest.mark.parametrize("parts", SAID)
def test_the_clients_helper_joins_the_parts(parts: list[Said]) -> None:
    events, _ = replied(parts)
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    found = [made for event in events for made in state.handle_event(EVENT.validate_python(event))]
    last = {one.item_id: one.snapshot for one in found if hasattr(one, "snapshot")}
    assert list(last.values()) == ["So be it", '{"x": 1}', "{}"]
    assert [item.to_dict() for item in found[-1].response.output if item.type == "reasoning"] == [events[-1]["response"]["output"][0]]


def test_text_that_follows_a_call_in_one_part_is_an_item_after_it() -> None:
    events, _ = replied([Said(calls=[FIRST]), Said("done", calls=[CallPart(0, "{}")])])
    call, message = events[-1]["response"]["output"]
    assert (call["arguments"], message["content"][0]["text"]) == ("{}", "done")


def test_a_reply_that_is_cut_off_has_one_incomplete_item() -> None:
    events, kept = replied([THOUGHT, Said(calls=[FIRST]), Said(calls=[CallPart(0, '{"x')])], FinishReason.LENGTH)
    thought, call = kept[0]["output"]
    assert (thought["status"], call["status"], call["arguments"]) == ("completed", "incomplete", '{"x')
    assert events[-1]["type"] == "response.incomplete"


def test_a_reply_without_text_is_an_empty_message() -> None:
    _, kept = replied([Said()])
    assert [part["text"] for part in kept[0]["output"][0]["content"]] == [""]


def test_a_failure_ends_the_open_item() -> None:
    events, kept = replied([TEXT], error=Refused(503, "out of memory for this request"))
    assert [event["type"] for event in events[-2:]] == ["response.output_item.done", "response.failed"]
    assert kept[0]["error"] == {"code": "server_error", "message": "out of memory for this request"}
    assert (kept[0]["status"], kept[0]["output"][0]["status"]) == ("failed", "incomplete")
    events, kept = replied([], error=Refused(504, "late"))
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert kept[0]["output"] == []


def test_log_probabilities_belong_to_the_text() -> None:
    """A token whose text comes later counts with it; those of marks and calls are left out."""
    text = [Said(), TEXT, Said(), Said(" be it"), Said()]
    _, kept = replied([THOUGHT, *text], logprobs=True)
    found = [one["token"] for one in kept[0]["output"][1]["content"][0]["logprobs"]]
    tokenizer = embedded().tokenizer
    assert found == [tokenizer.bytes_of(token).decode("utf-8", "replace") for token in (6, 7, 8, 9, 10)]
    _, kept = replied([TEXT, Said(), Said(calls=[FIRST])], logprobs=True)
    assert len(kept[0]["output"][0]["content"][0]["logprobs"]) == 1
