"""Conversations with every role as the template receives them, and texts that take too long to tokenize."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.raw import PATIENCE, Live, embedded, live

TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<{{ m.tool_call_id }}={{ m.content }}>{% else %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls %}({{ call.function.name }} {{ call.function.arguments.place }}){% endfor %}{% endif %}{% endfor %}"
)
ASK = {"role": "user", "content": "warm?"}
CALL = {"id": "c1", "type": "function", "index": 0, "function": {"name": "sensor", "arguments": '{"place": "x"}'}}
HISTORY = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "21"}]


@pytest.fixture(scope="module")
def tools() -> Iterator[Live]:
    with live(chat_template=TOOLS) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


def rendered(server: Live, messages: Any, **options: Any) -> str:
    got = server.ask("POST", "/tokenize", {"messages": messages, "return_token_strs": True, **options})
    assert got.status == 200, got.body
    return "".join(got.json["token_strs"])


def test_calls_and_results_of_tools(tools: Live) -> None:
    expected = "[user]warm?[assistant](sensor x)<c1=21>"
    assert rendered(tools, HISTORY) == expected
    direct = {"function": {"name": "sensor", "arguments": {"place": "x"}}}
    assert rendered(tools, [ASK, {"role": "assistant", "tool_calls": [direct]}, HISTORY[2]]) == expected
    empty = {"function": {"name": "sensor", "arguments": ""}}
    assert rendered(tools, [{"role": "assistant", "tool_calls": [empty]}]) == "[assistant](sensor )"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]}, "messages"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.0.tool_calls.0.function.name"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages.0"),
    ],
)
def test_calls_that_are_none(tools: Live, message: Any, param: str) -> None:
    answer = tools.chat(messages=[message])
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_a_template_without_tools_gets_them_as_text(server: Live) -> None:
    got = rendered(server, HISTORY, tools=[{"type": "function", "function": {"name": "sensor", "strict": True}}])
    assert '<tools>\n{"type": "function", "function": {"name": "sensor"}}\n</tools>' in got
    assert '<tool_call>\n{"name": "sensor", "arguments": {"place": "x"}}\n</tool_call>' in got
    assert "<tool_response>\n21\n</tool_response>" in got
    assert server.chat(messages=HISTORY, max_tokens=2).status == 200


def test_the_role_developer_is_system_where_the_template_has_none(tools: Live) -> None:
    developer = [{"role": "developer", "content": "Be terse."}, ASK]
    assert rendered(tools, developer) == "[system]Be terse.[user]warm?"
    with live(chat_template="{% for m in messages %}{{ m.role }}{% if m.role == 'developer' %}!{% endif %}{% endfor %}") as knows:
        assert rendered(knows, developer) == "developer!user"


@pytest.mark.parametrize("name", ["self", "messages", "template", "tokenize", "conversation", "variables", "a b"])
def test_variables_that_are_arguments_are_refused(server: Live, name: str) -> None:
    answer = server.chat(chat_template_kwargs={name: 1})
    assert (answer.status, answer.json["error"]["param"]) == (400, "chat_template_kwargs")


def test_an_error_of_a_template_is_shown_without_paths() -> None:
    with live(chat_template="{{ raise_exception('roles alternate user/assistant, not ' + messages[0].content) }}") as made:
        message = made.chat(messages=[{"role": "user", "content": "/srv/x"}]).json["error"]["message"]
    assert "user/assistant" in message and "srv" not in message


def test_reading_a_prompt_ends_with_the_time_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    hold, encode = threading.Event(), embedded().tokenizer.encode

    def slow(text: str, **given: Any) -> list[int]:
        hold.wait(PATIENCE)
        return encode(text, **given)

    with live(request_timeout=0.3) as server:
        monkeypatch.setattr(server.llm.tokenizer, "encode", slow)
        for answer in (server.complete("a"), server.chat(), server.ask("POST", "/tokenize", {"prompt": "a"})):
            assert answer.status == 504 and answer.json["error"]["type"] == "timeout_error"
        hold.set()
        monkeypatch.undo()
        server.until(lambda: server.complete("a", max_tokens=1).status == 200)
