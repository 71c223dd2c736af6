"""Tools through the official client: calls that are forced, calls that the model may make, and their results in the history."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from redraft.llm import LLM
from tests.checkpoints import tiny_llama
from tests.serve.live import Live

MESSAGES: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


class Weather(BaseModel):
    """Looks up the weather."""

    place: Literal["Oslo", "Bergen"]
    days: Literal[1, 2]


class Clock(BaseModel):
    """Tells the time."""


TOOLS: Any = [openai.pydantic_function_tool(Weather, name="weather"), openai.pydantic_function_tool(Clock, name="clock")]
WEATHER: Any = {"type": "function", "function": {"name": "weather"}}
ANSWER: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False},
    },
}


def chat(client: openai.OpenAI, messages: Any = MESSAGES, **options: Any) -> Any:
    given: dict[str, Any] = {"tools": TOOLS, "temperature": 0, "max_completion_tokens": 64, **options}
    return client.chat.completions.create(model="embedded", messages=messages, **given)


def made(choice: Any, form: str = "call_[0-9a-f]{24}") -> list[tuple[str, Any]]:
    """The calls of a choice, each checked. form: that of their ids."""
    assert all(re.fullmatch(form, call.id) and call.type == "function" for call in choice.message.tool_calls)
    found = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    for name, arguments in found:
        {"weather": Weather, "clock": Clock}[name].model_validate(arguments)
    return found


def gathered(chunks: Any) -> list[dict[str, str]]:
    """The calls of a stream."""
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or ():
                if part.index == len(calls):
                    assert part.id and part.type == "function" and part.function.name
                    calls.append({"name": part.function.name, "arguments": ""})
                else:
                    assert part.id is part.type is part.function.name is None
                calls[part.index]["arguments"] += part.function.arguments
    return calls


@pytest.mark.parametrize("choice", ["required", WEATHER], ids=str)
def test_a_call_that_must_be(client: openai.OpenAI, choice: Any) -> None:
    reply = chat(client, tool_choice=choice, parallel_tool_calls=False)
    (one,) = reply.choices
    ((name, _),) = made(one)
    assert name == "weather" or choice == "required"
    assert (one.message.content, one.finish_reason) == (None, "tool_calls")
    chunks = list(chat(client, tool_choice=choice, parallel_tool_calls=False, stream=True, extra_body={"speculation": "off"}))
    (function,) = (call.function for call in one.message.tool_calls)
    assert gathered(chunks) == [{"name": function.name, "arguments": function.arguments}]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    if name == "weather":
        assert len([chunk for chunk in chunks if chunk.choices[0].delta.tool_calls]) > 3, "arguments are sent while they arrive"


def test_the_other_function(client: openai.OpenAI) -> None:
    reply = chat(client, tool_choice={"type": "function", "function": {"name": "clock"}})
    assert made(reply.choices[0]) == [("clock", {})]


@pytest.mark.parametrize("strict", [False, True])
def test_arguments_have_no_others(client: openai.OpenAI, llm: LLM, strict: bool) -> None:
    """The model is made to continue the object wherever it may."""
    function = {"name": "f", "strict": strict, "parameters": {"properties": {"a": {"const": 1}}, "required": ["a"]}}
    tokens = {llm.tokenizer.encode(text, special=False)[0] for text in (",", ', "', ", ")}
    (choice,) = chat(
        client,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        logit_bias=dict.fromkeys(map(str, tokens), 100),
    ).choices
    assert choice.message.tool_calls[0].function.arguments == '{"a": 1}'


def test_several_texts_have_calls_of_their_own(client: openai.OpenAI) -> None:
    options: Any = {"tool_choice": "required", "parallel_tool_calls": False, "n": 3, "temperature": 1.5, "seed": 5, "logprobs": True}
    reply = chat(client, **options, extra_body={"return_token_ids": True, "provenance": True})
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids) == 3
    for choice in reply.choices:
        made(choice)
        assert len(choice.logprobs.content) == len(choice.token_ids) == len(choice.provenance), "of all tokens"
    assert reply.usage.completion_tokens == sum(len(choice.token_ids) for choice in reply.choices)
    chunks = list(chat(client, **options, stream=True))
    for choice in reply.choices:
        own = [chunk for chunk in chunks if chunk.choices[0].index == choice.index]
        (function,) = (call.function for call in choice.message.tool_calls)
        assert gathered(own) == [{"name": function.name, "arguments": function.arguments}]


def test_speculation_does_not_change_a_call(client: openai.OpenAI) -> None:
    options: Any = {"tool_choice": WEATHER, "temperature": 1.0, "seed": 11}
    plain = chat(client, **options, extra_body={"speculation": "off"})
    for method in ("copyspec", "token-recycling", "draft-model"):
        drafted = chat(client, **options, extra_body={"speculation": {"method": method}})
        assert made(drafted.choices[0]) == made(plain.choices[0])


def test_a_call_that_does_not_fit(client: openai.OpenAI) -> None:
    (choice,) = chat(client, tool_choice=WEATHER, max_completion_tokens=20).choices
    assert choice.finish_reason == "length"
    (choice,) = chat(client, tool_choice=WEATHER, stop="place").choices
    assert (choice.finish_reason, choice.message.tool_calls[0].function.arguments) == ("tool_calls", '{"')


def test_the_client_s_own_ways(client: openai.OpenAI) -> None:
    options: Any = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": WEATHER, "temperature": 0, "max_completion_tokens": 64}
    parsed = client.chat.completions.parse(model="embedded", **options).choices[0].message.tool_calls
    assert parsed is not None and isinstance(parsed[0].function.parsed_arguments, Weather)
    with client.chat.completions.stream(model="embedded", **options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert "".join(event.arguments_delta for event in deltas) == done.arguments == parsed[0].function.arguments
    calls = final.choices[0].message.tool_calls
    assert calls is not None and calls[0].function.parsed_arguments == parsed[0].function.parsed_arguments == done.parsed_arguments


def test_a_model_that_may_call(client: openai.OpenAI) -> None:
    """The embedded model does not, so its text is the content, as if nothing were parsed."""
    (auto,) = chat(client).choices
    assert auto.message.tool_calls is None and auto.message.content and auto.finish_reason in ("stop", "length")
    for more in ({"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": "auto", "extra_body": {"ignore_eos": True}}):
        assert chat(client, **more).choices[0].message.content.startswith(auto.message.content)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert "".join(pieces) == auto.message.content


def test_an_answer_in_json_or_a_call(client: openai.OpenAI, llm: LLM) -> None:
    """The first token decides, so it is chosen for the model."""
    (answer,), (call,) = (llm.tokenizer.encode(text, special=False) for text in "{<")
    for token in (answer, call):
        (choice,) = chat(client, response_format=ANSWER, parallel_tool_calls=False, logit_bias={str(token): 100}).choices
        if token == answer:
            assert (json.loads(choice.message.content), choice.message.tool_calls) == ({"a": 1}, None)
        else:
            assert choice.message.content is None and made(choice)
    options: Any = {"messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 64, "parallel_tool_calls": False}
    parsed = client.chat.completions.parse(model="embedded", response_format=Clock, **options).choices[0].message
    assert parsed.tool_calls or isinstance(parsed.parsed, Clock)


def test_results_in_the_history(client: openai.OpenAI) -> None:
    first = chat(client, tool_choice=WEATHER).choices[0].message
    said = [*MESSAGES, first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "cold"}]
    reply = chat(client, said, tool_choice="required", parallel_tool_calls=False)
    assert made(reply.choices[0])
    assert reply.usage.prompt_tokens_details.cached_tokens > 0, "the prompt begins as that of the first turn"
    assert chat(client, said, tools=openai.NOT_GIVEN).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"response_format": ANSWER}, "tool_choice"),
        ({"extra_body": {"structured_outputs": {"regex": "a"}}}, "tool_choice"),
        ({"extra_body": {"min_tokens": 4}}, "min_tokens"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
        ({"extra_body": {"function_call": "auto"}}, "function_call"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "returns": {}}}]}, "tools.0.function.returns"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * (1 << 18)}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools.0.function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "objekt"}}}}}]},
            "tools.0.function.parameters",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(client: openai.OpenAI, given: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **{"tool_choice": "required", **given})
    assert error.value.param == param


def test_a_schema_that_cannot_be_enforced_hinders_only_calls_that_must_follow_it(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}}]
    assert chat(client, tools=tools).choices[0].message.content


# ---- servers with other formats


@pytest.fixture(scope="module")
def thinking(llm: LLM) -> Iterator[Live]:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    with Live(llm.sibling(), chat_template=template, reasoning_parser="think", tool_call_parser="mistral") as live:
        yield live


def test_reasoning_is_apart(thinking: Live) -> None:
    with thinking.client() as client:
        plain = chat(client, tools=openai.NOT_GIVEN).choices[0].message
        assert plain.content == "" and plain.model_extra["reasoning_content"]
        chunks = list(chat(client, tools=openai.NOT_GIVEN, stream=True))
        joined = "".join(chunk.choices[0].delta.model_extra.get("reasoning_content", "") for chunk in chunks)
        assert joined == plain.model_extra["reasoning_content"]
        again = [*MESSAGES, plain.model_dump(), *MESSAGES]
        assert chat(client, again).choices[0].finish_reason
    thinking.settle()


def test_another_format(llm: LLM) -> None:
    with Live(llm.sibling(), tool_call_parser="mistral") as live, live.client() as client:
        (call,) = chat(client, tool_choice=WEATHER).choices[0].message.tool_calls
        assert re.fullmatch("[A-Za-z0-9]{9}", call.id) and Weather.model_validate_json(call.function.arguments)
        live.settle()
    with Live(llm.sibling(), tool_call_parser="none") as live, live.client() as client:
        with pytest.raises(openai.BadRequestError, match="reads no tool calls"):
            chat(client, tool_choice="required")
        assert chat(client).choices[0].message.content
        live.settle()


def test_marks_that_are_special_tokens(tmp_path: Path) -> None:
    """The bias makes the model begin a call. Other special tokens are no content."""
    path = tiny_llama(tmp_path, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = path / name
        file.write_text(file.read_text().replace("<pad>", "[TOOL_CALLS]"))
    template = "{{ tools | length }}{% for m in messages %}{{ m.content }}{% endfor %}[TOOL_CALLS]"
    with Live(LLM(str(path), dtype="float32", max_model_len=1024), chat_template=template) as live, live.client() as client:

        def choice(**options: Any) -> Any:
            given: dict[str, Any] = {"parallel_tool_calls": False, "max_completion_tokens": 120, "temperature": 0, **options}
            return client.chat.completions.create(model=path.name, messages=MESSAGES, tools=TOOLS, **given).choices[0]

        begun = choice(logit_bias={"0": 100})
        assert made(begun, "[A-Za-z0-9]{9}") and begun.finish_reason == "tool_calls"
        required = choice(tool_choice="required", extra_body={"return_token_ids": True})
        assert made(required, "[A-Za-z0-9]{9}") and required.token_ids[0] == 0
        ended = choice(logit_bias={"2": 100})
        assert (ended.message.content, ended.message.tool_calls, ended.finish_reason) == ("", None, "stop")
        shown = choice(logit_bias={"2": 100}, extra_body={"skip_special_tokens": False})
        assert shown.message.content == "</s>"
        named = choice(logit_bias={"0": 100}, tool_choice="none", extra_body={"skip_special_tokens": False}, max_completion_tokens=2)
        assert named.message.content == "[TOOL_CALLS]" * 2
        live.settle()
