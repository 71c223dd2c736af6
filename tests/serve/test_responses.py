"""The Responses API through the official client. Every answer and event is checked against the client's types and our document's."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

from redraft import SamplingParams
from redraft.llm import LLM
from redraft.serve import responses_documents as documents
from tests.serve.conftest import Clock
from tests.serve.live import Live

ASK = "What is a list?"
SYSTEM = "Answer in one word. " * 16  # more than a page of the prefix cache
STOPPED = {"stop": ["2, 2.2, 2.2"]}  # the reply has it
EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)
ITEM: Any = pydantic.TypeAdapter(ResponseItem)
LOGPROBS = ["message.output_text.logprobs"]
LONG: Any = {"max_output_tokens": 400, "extra_body": {"ignore_eos": True, "speculation": "off"}}


class Point(pydantic.BaseModel):
    kind: Literal["near", "far"]
    known: bool


def ask(client: openai.OpenAI, input: Any = ASK, **options: Any) -> Any:
    """A response, checked; or the checked events of a stream."""
    made = client.responses.create(**{"model": "embedded", "input": input, "temperature": 0, "max_output_tokens": 24, **options})
    if not options.get("stream"):
        return checked(made)
    events = [event.to_dict() for event in made]
    for event in events:
        EVENT.validate_python(event)
        documents.ResponseEvent.model_validate(event)
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def checked(response: Response) -> Response:
    Response.model_validate(response.to_dict())
    documents.Response.model_validate(response.to_dict())
    return response


def alone(llm: LLM, messages: Any, **params: Any) -> Any:
    """The same from the engine, without drafts."""
    return llm.chat(messages, SamplingParams(**{"temperature": 0, "max_tokens": 24, "draft": "none", **params}))[0]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# ---- a response


def test_a_response(client: openai.OpenAI, llm: LLM) -> None:
    response = ask(client, extra_body=STOPPED, metadata={"a": "b"}, user="me")
    expected = alone(llm, [user(ASK)], stop=STOPPED["stop"])
    assert response.output_text == expected.outputs[0].text
    assert (response.id[:5], response.object, response.model, response.status) == ("resp_", "response", "embedded", "completed")
    (item,) = response.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == ("message", "assistant", "completed", [])
    assert response.error is response.incomplete_details is None
    assert response.completed_at >= response.created_at
    assert (response.metadata, response.user, response.temperature, response.max_output_tokens) == ({"a": "b"}, "me", 0, 24)
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True)
    usage = response.usage
    assert usage.input_tokens == len(expected.prompt_token_ids)
    assert usage.output_tokens == len(expected.outputs[0].token_ids)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert response._request_id == response.id


def test_a_response_that_is_cut_off_says_why(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output[0].status, response.completed_at) == ("incomplete", None)
    assert response.usage.output_tokens == 3


def test_a_text_and_items_are_the_same_conversation(client: openai.OpenAI, llm: LLM) -> None:
    said = ask(client, instructions="Be brief.").output_text
    part = {"type": "input_text", "text": ASK}
    assert said == ask(client, [{"role": "system", "content": "Be brief."}, user(ASK)]).output_text
    assert said == ask(client, [{"type": "message", "role": "user", "content": [part]}], instructions="Be brief.").output_text
    assert said == alone(llm, [{"role": "system", "content": "Be brief."}, user(ASK)]).outputs[0].text


def test_log_probabilities(client: openai.OpenAI) -> None:
    response = ask(client, include=LOGPROBS, top_logprobs=2)
    chat: Any = {"model": "embedded", "messages": [user(ASK)], "temperature": 0, "max_completion_tokens": 24}
    expected = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert expected is not None and expected.content is not None
    found = response.output[0].content[0].logprobs
    assert [one.to_dict() for one in found] == [one.to_dict() for one in expected.content]
    events = ask(client, include=LOGPROBS, top_logprobs=2, stream=True)
    parts = [one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    (done,) = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
    assert parts == done == [one.to_dict() for one in found]
    assert ask(client).output[0].content[0].logprobs == []


def test_our_own_fields(client: openai.OpenAI) -> None:
    plain = ask(client, temperature=1, extra_body={"seed": 7, "speculation": "off"})
    assert plain.metrics["drafted"] == 0
    drafted = ask(client, temperature=1, extra_body={"seed": 7, "speculation": {"method": "copyspec"}, "provenance": True})
    assert drafted.output_text == plain.output_text
    assert len(drafted.provenance) == 24 and drafted.trees
    again = ask(client, temperature=1, extra_body={"seed": plain.metrics["seeds"][0], "cache": {"codec": "none"}, "return_token_ids": True})
    assert again.output_text == plain.output_text and len(again.token_ids) == 24
    predicted = ask(client, extra_body={"prediction": {"type": "content", "content": ask(client).output_text}})
    assert predicted.usage.output_tokens_details.accepted_prediction_tokens > 0


# ---- streams


def test_a_stream_is_the_response_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, extra_body=STOPPED)
    events = ask(client, extra_body=STOPPED, stream=True)
    kinds = [event["type"].removeprefix("response.") for event in events]
    begin, end = ["created", "in_progress", "output_item.added", "content_part.added"], ["output_text.done", "content_part.done"]
    assert kinds[:4] == begin
    assert kinds[-4:] == [*end, "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in events if "delta" in event) == whole.output_text == events[-4]["text"]
    created, last = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert last["output"] == [events[-2]["item"]] and events[-3]["part"] in last["output"][0]["content"]
    assert {event["item_id"] for event in events if "item_id" in event} == {last["output"][0]["id"]}
    assert last["usage"]["output_tokens"] == whole.usage.output_tokens
    assert client.responses.retrieve(last["id"]).to_dict() == last


def test_a_stream_that_is_cut_off(client: openai.OpenAI) -> None:
    events = ask(client, stream=True, max_output_tokens=3)
    assert (events[-1]["type"], events[-2]["item"]["status"]) == ("response.incomplete", "incomplete")
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    whole = ask(client, extra_body=STOPPED)
    with client.responses.stream(model="embedded", input=ASK, temperature=0, max_output_tokens=24, extra_body=STOPPED) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == "".join(deltas) == whole.output_text


def test_a_stream_that_fails_ends_with_the_response(llm: LLM, clock: Clock) -> None:
    with Live(llm.sibling()) as slow, slow.client() as client:
        step, steps = slow.llm.engine.step, itertools.count(1)

        def late() -> Any:
            """After the third step."""
            time.sleep(0.02)
            clock.ahead = 3600.0 if next(steps) > 3 else 0.0
            return step()

        slow.llm.engine.step = late  # type: ignore[method-assign]
        *_, last = ask(client, stream=True, **LONG)
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
        assert "took longer" in last["response"]["error"]["message"]
        assert client.responses.retrieve(last["response"]["id"]).status == "failed"
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, **LONG)
        assert error.value.status_code == 504
        slow.settle()


def test_a_client_that_leaves_ends_its_response(client: openai.OpenAI, live: Live) -> None:
    with client.responses.create(model="embedded", input=ASK, stream=True, **LONG) as stream:
        created = next(iter(stream))
    live.settle()
    assert refused(client.responses.retrieve, created.response.id)[0] == 404  # type: ignore[union-attr]


def test_a_stream_with_nothing_to_tell_says_that_it_lives(llm: LLM) -> None:
    with Live(llm.sibling(), keep_alive=0.001) as live, live.client() as client:
        with client.responses.with_streaming_response.create(model="embedded", input=ASK * 15, max_output_tokens=3, stream=True) as made:
            lines = list(made.iter_lines())
        assert ": still at work" in lines and "event: response.incomplete" in lines
        live.settle()


# ---- structured output


def test_a_parsed_response(client: openai.OpenAI) -> None:
    made = client.responses.parse(model="embedded", input=ASK, temperature=0, max_output_tokens=64, text_format=Point)
    assert made.status == "completed" and isinstance(made.output_parsed, Point)
    assert made.text is not None and made.text.format is not None and made.text.format.type == "json_schema"
    with client.responses.stream(model="embedded", input=ASK, temperature=0, max_output_tokens=64, text_format=Point) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == made.output_parsed
    again = client.responses.create(model="embedded", input=[user(ASK), *made.output, user("why?")], max_output_tokens=2)  # type: ignore[list-item]
    assert again.output


def test_a_json_object(client: openai.OpenAI) -> None:
    assert ask(client, text={"format": {"type": "json_object"}}).output_text.lstrip().startswith("{")
    assert ask(client, text={"format": {"type": "text"}}).output_text == ask(client).output_text


# ---- tools


def tool(name: str = "roll", **more: Any) -> dict[str, Any]:
    limits = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = {"type": "object", "properties": {"sides": limits}, "required": ["sides"], "additionalProperties": False}
    return {"type": "function", "name": name, "description": "Rolls dice.", "parameters": schema, "strict": True, **more}


NAMED = {"type": "function", "name": "roll"}


def test_a_call_that_must_be_made(client: openai.OpenAI) -> None:
    given: Any = {"tools": [tool("other"), tool()], "tool_choice": NAMED}
    response = ask(client, "Roll.", max_output_tokens=60, **given)
    (call,) = response.output
    assert (response.status, call.type, call.name, call.status) == ("completed", "function_call", "roll", "completed")
    assert 1 <= json.loads(call.arguments)["sides"] <= 9
    assert call.call_id and call.id != call.call_id
    assert (response.tool_choice.to_dict(), [one.name for one in response.tools]) == (NAMED, ["other", "roll"])
    events = ask(client, "Roll.", max_output_tokens=60, stream=True, **given)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2] == "output_item.added" and kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events if "delta" in event) == call.arguments == events[-3]["arguments"]


def test_the_helpers_parse_calls(client: openai.OpenAI) -> None:
    class Roll(pydantic.BaseModel):
        sides: Literal[4, 6]

    given: Any = {"model": "embedded", "input": "Roll.", "tools": [openai.pydantic_function_tool(Roll)], "tool_choice": "required"}
    given |= {"temperature": 0, "max_output_tokens": 60, "parallel_tool_calls": False}
    given["tools"] = [{"type": "function", **given["tools"][0]["function"]}]
    made = client.responses.parse(**given)
    assert json.loads(made.output[0].arguments)["sides"] in (4, 6)  # type: ignore[union-attr]
    with client.responses.stream(**given) as stream:
        stream.until_done()
        final = stream.get_final_response()
    assert [item.arguments for item in final.output] == [item.arguments for item in made.output]  # type: ignore[union-attr]


def test_the_result_of_a_call_goes_back(client: openai.OpenAI, llm: LLM) -> None:
    first = ask(client, "Roll.", max_output_tokens=60, tools=[tool()], tool_choice=NAMED)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    second = ask(client, [result], previous_response_id=first.id, tools=[tool()])
    by_hand = ask(client, [user("Roll."), call, result], tools=[tool()])
    assert second.output_text == by_hand.output_text != ""
    calls = [{"id": call.call_id, "type": "function", "function": {"name": "roll", "arguments": call.arguments}}]
    answer = {"role": "tool", "tool_call_id": call.call_id, "content": "5"}
    chat: Any = [user("Roll."), {"role": "assistant", "tool_calls": calls}, answer]
    function = {name: value for name, value in tool().items() if name != "type"}
    tools: Any = [{"type": "function", "function": function}]
    same = client.chat.completions.create(model="embedded", messages=chat, tools=tools, temperature=0, max_completion_tokens=24)
    assert same.choices[0].message.content == second.output_text
    (listed,) = client.responses.input_items.list(second.id).data
    ITEM.validate_python(listed.to_dict())
    assert (listed.type, listed.call_id, listed.output) == ("function_call_output", call.call_id, "5")  # type: ignore[union-attr]


def test_no_call_is_made_if_none_may_be(client: openai.OpenAI) -> None:
    response = ask(client, tools=[tool()], tool_choice="none")
    assert [item.type for item in response.output] == ["message"]


# ---- conversations


def test_a_response_continues_another(client: openai.OpenAI, llm: LLM) -> None:
    first = ask(client, SYSTEM + ASK)
    second = ask(client, "And a tuple?", previous_response_id=first.id)
    expected = [user(SYSTEM + ASK), {"role": "assistant", "content": first.output_text}, user("And a tuple?")]
    assert second.output_text == alone(llm, expected).outputs[0].text
    assert second.previous_response_id == first.id
    third = ask(client, [user("And a set?")], previous_response_id=second.id)
    expected += [{"role": "assistant", "content": second.output_text}, user("And a set?")]
    assert third.output_text == alone(llm, expected).outputs[0].text
    by_hand = [user(SYSTEM + ASK), *first.output, user("And a tuple?"), *second.output, user("And a set?")]
    assert ask(client, by_hand, store=False).output_text == third.output_text


def test_what_went_before_is_in_the_prefix_cache(client: openai.OpenAI, live: Live) -> None:
    page = live.llm.engine.memory.paged.table.page
    first = ask(client, SYSTEM + "once more", max_output_tokens=40)
    second = ask(client, "And a tuple?", previous_response_id=first.id)
    prompt = first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= prompt // page * page > 0


def test_instructions_are_of_one_response(client: openai.OpenAI, llm: LLM) -> None:
    first = ask(client, instructions="Be brief.")
    second = ask(client, "And?", previous_response_id=first.id, instructions="Be long.")
    said = [user(ASK), {"role": "assistant", "content": first.output_text}, user("And?")]
    assert second.output_text == alone(llm, [{"role": "system", "content": "Be long."}, *said]).outputs[0].text
    assert (first.instructions, second.instructions) == ("Be brief.", "Be long.")


def test_reasoning_is_an_item(llm: LLM) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    with Live(llm.sibling(), chat_template=template, reasoning_parser="think") as live, live.client() as client:
        response = ask(client)
        (thought,) = response.output
        assert (thought.type, thought.status, response.status) == ("reasoning", "incomplete", "incomplete")
        assert thought.content[0].text and response.output_text == ""
        assert 0 < response.usage.output_tokens_details.reasoning_tokens <= 24
        events = ask(client, stream=True)
        assert "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta") == thought.content[0].text
        again = ask(client, [user(ASK), thought, user("And?")])
        assert again.output[0].content == ask(client, "And?", previous_response_id=response.id).output[0].content
        live.settle()


def test_a_chat_takes_an_effort_too(llm: LLM) -> None:
    template = "{{ reasoning_effort }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with Live(llm.sibling(), chat_template=template) as live, live.client() as client:
        asked = {"model": "embedded", "messages": [user(ASK)], "max_tokens": 2}
        low, high = (client.chat.completions.create(reasoning_effort=effort, **asked).usage.prompt_tokens for effort in ("low", "l" * 40))
        assert high > low
        live.settle()
    with Live(llm.sibling(), chat_template="{{ messages[0].content }}") as live, live.client() as client:
        with pytest.raises(openai.BadRequestError, match="the chat template does not know an effort of reasoning") as error:
            client.chat.completions.create(reasoning_effort="low", **asked)
        assert error.value.param == "reasoning_effort"
        live.settle()


def test_what_the_template_knows_of_reasoning(llm: LLM) -> None:
    template = "{{ reasoning_effort }}{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    with Live(llm.sibling(), chat_template=template) as live, live.client() as client:
        said = ask(client, [user(ASK), thought, {"role": "assistant", "content": "a"}], reasoning={"effort": "high"})
        prompt = f"high[user|]{ASK}[assistant|hm]a"
        plain = client.completions.create(
            model="embedded", prompt=prompt, temperature=0, max_tokens=24, extra_body={"add_special_tokens": False}
        )
        assert said.output_text == plain.choices[0].text
        assert said.reasoning.effort == "high"
        live.settle()


# ---- stored responses


def refused(call: Any, *given: Any, **options: Any) -> tuple[int, Any]:
    with pytest.raises(openai.APIStatusError) as error:
        call(*given, **options)
    return error.value.status_code, error.value.body


def test_a_stored_response_is_read_and_forgotten(client: openai.OpenAI) -> None:
    first = ask(client)
    second = ask(client, "And?", previous_response_id=first.id)
    assert checked(client.responses.retrieve(first.id)) == first
    client.responses.delete(first.id)
    status, error = refused(client.responses.retrieve, first.id)
    assert (status, error["param"]) == (404, "response_id")
    assert refused(client.responses.delete, first.id)[0] == refused(client.responses.input_items.list, first.id)[0] == 404
    status, error = refused(ask, client, "And?", previous_response_id=second.id)
    assert (status, error["param"], error["code"]) == (404, "previous_response_id", "previous_response_not_found")
    assert client.responses.retrieve(second.id).output_text == second.output_text


def test_nothing_is_stored_if_the_client_says_so(client: openai.OpenAI) -> None:
    response = ask(client, store=False)
    assert response.store is False and ask(client).store is True
    assert refused(client.responses.retrieve, response.id)[0] == 404
    events = ask(client, store=False, stream=True)
    assert refused(client.responses.retrieve, events[-1]["response"]["id"])[0] == 404


def test_input_items_and_their_pages(client: openai.OpenAI) -> None:
    turns = [user("a"), {"role": "assistant", "content": "b"}, {"role": "developer", "content": "c"}, user("d")]
    response = ask(client, turns, extra_body=STOPPED)
    listed = client.responses.input_items.list(response.id, order="asc")
    assert [item.content[0].text for item in listed.data] == ["a", "b", "c", "d"]  # type: ignore[union-attr]
    for item in listed.data:
        ITEM.validate_python(item.to_dict())
    backwards = list(client.responses.input_items.list(response.id, limit=3))
    assert backwards == [*reversed(listed.data)]
    page = client.responses.input_items.list(response.id, limit=2)
    documents.InputItems.model_validate(page.to_dict(), strict=True)
    assert page.has_more and len(page.data) == 2
    status, error = refused(client.responses.input_items.list, response.id, after="nothing")
    assert (status, error["param"]) == (400, "after")
    assert refused(client.responses.input_items.list, response.id, limit=0)[1]["param"] == "limit"
    assert refused(client.responses.input_items.list, response.id, include=LOGPROBS)[1]["param"] == "include[]"


def test_none_runs_in_the_background(client: openai.OpenAI) -> None:
    response = ask(client)
    status, error = refused(client.responses.cancel, response.id)
    assert status == 400 and "background" in error["message"]
    assert refused(client.responses.cancel, "resp_x")[0] == 404


def test_other_keys_see_no_response(llm: LLM) -> None:
    with Live(llm.sibling(), api_key=("key-a", "key-b")) as live, live.client(api_key="key-a") as one, live.client(api_key="key-b") as two:
        response = ask(one)
        for call in (two.responses.retrieve, two.responses.delete, two.responses.cancel, two.responses.input_items.list):
            status, foreign = refused(call, response.id)
            assert status == 404
            one_letter = response.id[:-1] + ("0" if response.id[-1] != "0" else "1")
            assert refused(call, one_letter) == (404, {**foreign, "message": foreign["message"].replace(response.id, one_letter)})
        assert refused(ask, two, previous_response_id=response.id)[0] == 404
        assert one.responses.retrieve(response.id) == response
        live.settle()


def test_a_server_stores_as_many_as_it_may(llm: LLM) -> None:
    with Live(llm.sibling(), stored_responses=2) as live, live.client() as client:
        first, second, third = [ask(client) for _ in range(3)]
        assert refused(client.responses.retrieve, first.id)[0] == 404
        assert client.responses.retrieve(second.id) == second and client.responses.retrieve(third.id) == third
    with Live(llm.sibling(), stored_responses=0) as live, live.client() as client:
        assert ask(client).store is False
        status, error = refused(ask, client, store=True)
        assert (status, error["param"]) == (400, "store")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"background": True}, "background", "background"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "stored prompts"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"max_tool_calls": 2}, "max_tool_calls", "tools of its own"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "compaction"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs", "20"),
        ({"tools": [tool(), tool()]}, "tools", "two have the name roll"),
        ({"tools": [tool(parameters={"type": "objekt"})], "tool_choice": NAMED}, "tools.0.parameters", "objekt"),
        ({"tools": [tool(name="no name")]}, "tools.0.name", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "no tool has the name x"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type", "allowed_tools"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "chat template"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "auto"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
        ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format", "name"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}}, "text.format.schema", "objekt"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "function_call_output"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0", "function_call_output"),
        ({"input": [user(ASK), {"type": "message", "role": "tool", "content": "x"}]}, "input.1.role", "tool"),
        ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input.0.content.0.type", "input_image"),  # type: ignore[arg-type]
        ({"input": [user([{"type": "input_file", "file_id": "x"}])]}, "input.0.content.0.type", "input_file"),  # type: ignore[arg-type]
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "input.0.arguments", "JSON object"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 99_999}]}, "input.0.arguments", "JSON"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input.0.encrypted_content", "unknown field"),
        ({"input": "word " * 3000}, "input", "max_model_len"),
        ({"input": [user("word")] * 4097}, "input", "4096"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"model": "nothing"}, "model", "embedded"),
        ({"extra_body": {"max_tokens": 5}}, "max_tokens", "max_output_tokens"),
        ({"extra_body": {"n": 2}}, "n", "several texts"),
        ({"extra_body": {"max_output_token": 2}}, "max_output_token", "did you mean 'max_output_tokens'"),
        ({"extra_body": {"speculation": {"method": "nothing"}}}, "speculation.method", "nothing"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex", "regex"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(client: openai.OpenAI, options: dict[str, Any], param: str, message: str) -> None:
    status, error = refused(ask, client, **options)
    assert status == (404 if param == "model" else 400)
    assert error["param"] == param and message in error["message"], error
    assert refused(ask, client, stream=True, **options) == (status, error)


def test_fields_without_effect(client: openai.OpenAI) -> None:
    same: Any = {
        "truncation": "disabled", "background": False, "text": {"verbosity": "medium"}, "reasoning": {"summary": "auto"},
        "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y", "conversation": None, "top_logprobs": 0,
        "stream_options": None, "prompt_cache_retention": "in_memory", "tools": [], "include": [],
    }  # fmt: skip
    response = ask(client, **same)
    assert response.output_text == ask(client).output_text
    assert (response.safety_identifier, response.prompt_cache_key) == ("x", "y")
