"""Structured output over HTTP: OpenAI's field and vLLM's, with drafts, streams, several texts and log-probabilities."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from redraft.sample.grammars.compiler import Compiler
from tests.serve.live import Live


class Answer(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    size: int = pydantic.Field(ge=0, le=99)


MESSAGES: Any = [{"role": "user", "content": "def f(x):"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema(), "strict": True}}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in ("structured_outputs", "speculation", "provenance", "cache") if name in fields}
    options = {"max_tokens": 80, "seed": 4, **fields}
    return client.chat.completions.create(model="embedded", messages=MESSAGES, extra_body=extra, **options)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_with_and_without_drafts_and_in_a_stream(client: openai.OpenAI, temperature: float) -> None:
    found = [
        chat(client, response_format=SCHEMA, temperature=temperature, n=3, speculation=speculation)
        for speculation in ("off", {"method": "token-recycling"}, {"method": "draft-model"}, {"method": "union:parts=copyspec+ngram"})
    ]
    texts = [[choice.message.content for choice in reply.choices] for reply in found]
    assert all(one == texts[0] for one in texts)
    for choice in found[0].choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), Answer.model_json_schema())
    streamed = ["", "", ""]
    for chunk in chat(client, response_format=SCHEMA, temperature=temperature, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts[0]


def test_parse_gives_the_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="embedded", messages=MESSAGES, response_format=Answer, max_tokens=80, seed=1)
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Answer) and 0 <= parsed.size <= 99


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-c]{2,6}!"}, "[a-c]{2,6}!"),
        ({"choice": ["yes", 'é "\n\\']}, r'yes|é "\n\\'),
        ({"choice": ["yes", "no (really)"]}, r"yes|no \(really\)"),
        ({"grammar": 'root ::= "<" [x-z]+ ">"'}, "<[x-z]+>?"),
        ({"grammar": '?start: sign+\n?sign: "<" | ">"\n'}, "[<>]+"),
        ({"json": {"enum": ["a", 3, None]}}, '"a"|3|null'),
    ],
)
def test_the_other_forms_in_completions_and_chats(client: openai.OpenAI, wanted: dict[str, Any], pattern: str) -> None:
    reply = chat(client, structured_outputs=wanted, logprobs=True, top_logprobs=2)
    assert re.fullmatch(pattern, reply.choices[0].message.content)
    assert "".join(one.token for one in reply.choices[0].logprobs.content).startswith(reply.choices[0].message.content)
    extra = {"structured_outputs": wanted, "provenance": True}
    completion = client.completions.create(model="embedded", prompt="x = ", max_tokens=60, seed=2, extra_body=extra)
    assert re.fullmatch(pattern, completion.choices[0].text)


def test_any_object_and_its_end(client: openai.OpenAI) -> None:
    text = chat(client, response_format={"type": "json_object"}, max_tokens=40).choices[0].message.content
    assert text.startswith("{")


def test_an_object_with_a_schema_as_llama_cpp_has_it(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_object", "schema": {"properties": {"a": {"const": 1}}, "required": ["a"]}}
    assert json.loads(chat(client, response_format=wanted).choices[0].message.content) == {"a": 1}
    wanted["type"] = "text"
    with pytest.raises(openai.BadRequestError, match="only type json_object takes it"):
        chat(client, response_format=wanted)


def test_tokens_that_the_grammar_forced_are_named(client: openai.OpenAI) -> None:
    reply = chat(client, response_format=SCHEMA, provenance=True, temperature=0)
    origins = {one["origin"] for one in reply.choices[0].provenance}
    assert "grammar" in origins
    nodes = [node for tree in reply.choices[0].trees for node in tree["nodes"] if node["origin"] == "grammar"]
    assert any(node["accepted"] for node in nodes)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "type json_schema needs it"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "text", "json_schema": SCHEMA["json_schema"]}}, "response_format", "no other type takes it"),
        ({"response_format": SCHEMA, "structured_outputs": {"regex": "a"}}, "structured_outputs", "exclude each other"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group|unclosed"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unknown field"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "a JSON schema is needed"),
        ({"structured_outputs": {"json": {"properties": {"a": {"type": "text"}}}}}, "structured_outputs.json", "#/properties/a/type"),
        ({"structured_outputs": {"json": {"schema": {"type": "object"}}}}, "structured_outputs.json", "its field 'schema' may be meant"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "str"}}}},
            "response_format.json_schema.schema",
            "^Error code: 400 - response_format.json_schema.schema: #/type: 'str' is no type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "name: field required",
        ),
        ({"response_format": "json_object"}, "response_format", "an object is allowed"),
        ({"structured_outputs": {"regex": "\\bword/s"}}, "structured_outputs.regex", r"regex = '\\\\bword/s': .*WordUnicode"),
        ({"structured_outputs": {"grammar": 'root ::= a\n\n"/"'}}, "structured_outputs.grammar", r"= 'root ::= a\\n\\n\"/\"': "),
        ({"grammar": 'root ::= "a"'}, "grammar", "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "extra": {"min_tokens": 2}}, "min_tokens", "not with structured_outputs"),
        ({"extra": {"guided_json": {}}}, "guided_json", "structured_outputs"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, said: str) -> None:
    fields = dict(fields)
    fields |= fields.pop("extra", {})
    with pytest.raises(openai.BadRequestError, match=said) as error:
        client.chat.completions.create(model="embedded", messages=MESSAGES, max_tokens=4, extra_body=fields)
    assert error.value.param == param


def test_a_slow_grammar_delays_nobody_else(live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answered, original = threading.Event(), threading.Event(), Compiler._compiled

    def slow(self: Compiler, grammar: Any) -> Any:
        begun.set()
        assert answered.wait(20)
        return original(self, grammar)

    monkeypatch.setattr(Compiler, "_compiled", slow)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(chat(client, structured_outputs={"regex": "slowly[0-9]"})))
    thread.start()
    assert begun.wait(20)
    assert chat(client, max_tokens=3).choices[0].message.content is not None
    answered.set()
    thread.join(20)
    assert re.fullmatch("slowly[0-9]", found[0].choices[0].message.content)
