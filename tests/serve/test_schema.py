"""The server is checked against its own OpenAPI document: by schemathesis, and by hand where that cannot check.

Its check positive_data_acceptance is left out, because a schema cannot say that token ids are in the vocabulary or that a prompt fits
the context. `scripts/prove fuzz` is the long form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from redraft.serve import documents, messages_documents, responses_documents
from redraft.serve.app import app
from redraft.serve.config import ServeConfig
from redraft.serve.errors import FORMS, TYPES, ErrorReply
from redraft.serve.limits import OPEN
from redraft.serve.llama_cpp_documents import LlamaError
from redraft.serve.messages_documents import MessageError
from redraft.serve.ollama_documents import OllamaError
from redraft.serve.schema import near_field
from tests.serve.raw import Live, embedded, live

KEY = "a-key"
HI = [{"role": "user", "content": "hi"}]
LEFT_OUT = ("positive_data_acceptance",)
EXAMPLES = 6
ERRORS = {
    "/v1/messages": MessageError,
    "/api/": OllamaError,
    **dict.fromkeys(("/completion", "/infill", "/props", "/apply-template"), LlamaError),
}

schemathesis.checks.load_all_checks()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(api_key=(KEY,), max_n=2) as made:
        yield made


@pytest.fixture(scope="module")
def document(server: Live) -> Any:
    return server.ask("GET", "/openapi.json", Authorization=f"Bearer {KEY}").json


def operations() -> list[Any]:
    """Of the document as it is without a server: methods and paths are the same."""
    paths = app(embedded(), ServeConfig()).openapi()["paths"]
    return [(path, method.upper()) for path, several in paths.items() for method in several]


@pytest.fixture(scope="module")
def made(server: Live, document: Any) -> Any:
    """What schemathesis makes of the document."""
    found = schemathesis.openapi.from_dict(document)
    found.config.update(base_url=f"http://127.0.0.1:{server.port}", headers={"Authorization": f"Bearer {KEY}"})
    return found


@pytest.mark.parametrize(("path", "method"), operations())
def test_no_answer_differs_from_the_document(made: Any, document: Any, path: str, method: str) -> None:
    excluded = [check for check in CHECKS.get_all() if check.__name__ in LEFT_OUT]
    assert len(excluded) == len(LEFT_OUT)

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=made[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def good(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded, timeout=300)

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=made[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def bad(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded, timeout=300)

    good()
    if "requestBody" in document["paths"][path][method.lower()]:  # the others have no input that could be wrong
        bad()


def test_errors_of_every_interface_have_its_form(server: Live) -> None:
    for path in ("/v1/messages", "/api/chat", "/completion", "/completions", "/infill", "/apply-template"):
        kind = next(kind for begin, kind in ERRORS.items() if path.startswith(begin))
        for answer in (server.ask("POST", path, {"surprise": 1}), server.ask("POST", path, {"surprise": 1}, Authorization=f"Bearer {KEY}")):
            assert answer.status in (400, 401)
            kind.model_validate(answer.json)
    assert set(ERRORS) == set(FORMS)


def test_errors_have_one_form_and_nothing_else_is_promised(document: Any) -> None:
    assert not [name for name in document["components"]["schemas"] if "ValidationError" in name]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert "422" not in statuses and {"200", "400", "500"} <= statuses
            assert ("401" in statuses) == ("security" in operation) == (path not in OPEN)
            of_messages = path.startswith("/v1/messages")
            if "security" in operation:
                assert operation["security"] == [{"key": []}, {"x-api-key": []}][: 1 + of_messages]
            for status in statuses - {"200"}:
                form = operation["responses"][status]["content"]["application/json"]["schema"]
                kind = next((kind for begin, kind in ERRORS.items() if path.startswith(begin)), ErrorReply)
                assert form == {"$ref": f"#/components/schemas/{kind.__name__}"}
            for form in operation["responses"]["200"]["content"].values():
                assert form["schema"] not in ({}, {"type": "object", "additionalProperties": True}), path
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}, "x-api-key": header}
    assert set(documents.STATUSES) <= set(TYPES)


def test_without_keys_none_are_spoken_of() -> None:
    made = app(embedded(), ServeConfig()).openapi()
    assert "securitySchemes" not in made["components"] and '"401"' not in json.dumps(made)


def test_other_methods_are_refused_and_the_right_ones_named(server: Live) -> None:
    refused = server.ask("GET", "/v1/completions", Authorization=f"Bearer {KEY}")
    assert refused.status == 405 and refused.headers["Allow"] == "POST"
    ErrorReply.model_validate(refused.json)
    ErrorReply.model_validate(server.ask("GET", "/nowhere", Authorization=f"Bearer {KEY}").json)


@pytest.mark.parametrize(
    ("path", "chunk", "body"),
    [
        ("/v1/completions", documents.CompletionChunk, {"prompt": "def add(", "logprobs": 2, "echo": True}),
        ("/v1/completions", documents.CompletionChunk, {"prompt": ["a", "b"], "n": 2, "provenance": True, "return_token_ids": True}),
        ("/v1/chat/completions", documents.ChatChunk, {"messages": HI, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", documents.ChatChunk, {"messages": HI, "logprobs": True, "top_logprobs": 2}),
        ("/v1/messages", messages_documents.MessageEvent, {"messages": HI}),
    ],
)  # fmt: skip
def test_events_of_streams_have_the_documented_forms(server: Live, document: Any, path: str, chunk: Any, body: Any) -> None:
    answer = server.ask("POST", path, {**body, "stream": True, "max_tokens": 6}, Authorization=f"Bearer {KEY}")
    events = answer.events()
    assert len(events) > 1 and (events[-1] == "[DONE]") == (path != "/v1/messages")
    for event in events[:-1]:
        chunk.model_validate(event, strict=True)
    assert chunk.__name__ in document["components"]["schemas"]


def test_responses_and_their_events_have_the_documented_forms(server: Live, document: Any) -> None:
    body = {"input": "hi", "max_output_tokens": 6, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "provenance": True}
    whole = server.ask("POST", "/v1/responses", {**body, "return_token_ids": True}, Authorization=f"Bearer {KEY}").json
    responses_documents.Response.model_validate(whole, strict=True)
    events = server.ask("POST", "/v1/responses", {**body, "stream": True}, Authorization=f"Bearer {KEY}").events()
    assert [event["type"] for event in (events[0], events[-1])] == ["response.created", "response.incomplete"]
    for event in events:
        responses_documents.ResponseEvent.model_validate(event, strict=True)
    assert "ResponseEvent" in document["components"]["schemas"]
    listed = server.ask("GET", f"/v1/responses/{whole['id']}/input_items", Authorization=f"Bearer {KEY}").json
    responses_documents.InputItems.model_validate(listed, strict=True)
    deleted = server.ask("DELETE", f"/v1/responses/{whole['id']}", Authorization=f"Bearer {KEY}").json
    responses_documents.Deleted.model_validate(deleted, strict=True)


def test_all_that_can_be_asked_for_has_the_documented_form(server: Live) -> None:
    more = {"max_tokens": 6, "provenance": True, "return_token_ids": True, "prediction": {"type": "content", "content": "a, b, c"}}
    extras = {"prompt_logprobs": 1, "n": 2, **more}
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, **extras}
    for path, form, body in (
        ("/v1/completions", documents.Completion, {"prompt": "def add(", "logprobs": 2, **extras}),
        ("/v1/completions", documents.Completion, {"prompt": "def add(", "logprobs": 2, "echo": True, **more}),
        ("/v1/chat/completions", documents.ChatCompletion, chat),
    ):
        form.model_validate(server.ask("POST", path, body, Authorization=f"Bearer {KEY}").json, strict=True)


@pytest.mark.parametrize(
    ("name", "around", "near"),
    [
        ("max_token", {"prompt": "a"}, "max_tokens"),
        ("temprature", {"messages": []}, "temperature"),
        ("contents", {"role": "user"}, "content"),
        ("dimension", {"messages": []}, None),  # no body with messages has it
        ("xyz", {}, None),
    ],
)
def test_the_near_field_is_one_of_that_body(name: str, around: dict[str, Any], near: str | None) -> None:
    assert near_field(name, {**around, name: 1}) == near
