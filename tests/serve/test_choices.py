"""What a request may not choose, and what a reader of the server found in its first hour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from redraft.serve.choices import public
from tests.serve.raw import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(max_queue=20) as made:
        yield made


@pytest.mark.parametrize(
    "choice",
    [
        {"speculation": {"method": "token-recycling:path=/etc/passwd"}},
        {"speculation": {"method": "aded:path=/dev/zero"}},
        {"speculation": {"method": "vocabtrim:text=/etc/passwd"}},
        {"speculation": {"method": "union:parts=copyspec+(token-recycling:path=/etc/passwd)"}},
        {"speculation": {"method": "draft-model:model=/etc"}},
        {"cache": {"read": "double-sparsity:profile=/etc/passwd"}},
    ],
)
def test_no_request_names_a_file(server: Live, choice: dict[str, Any]) -> None:
    answer = server.complete("a", **choice)
    assert answer.status == 400
    error = answer.json["error"]
    assert "it may name a file" in error["message"] and "passwd" not in error["message"] and "No such" not in error["message"]


def test_no_place_on_the_machine_is_told() -> None:
    assert public("draft", "copyspec:gamma=4") == "copyspec:gamma=4"
    assert public("draft", "token-recycling:path=/srv/table.st") == "token-recycling"
    assert public("draft", "union:parts=copyspec+(token-recycling:path=/srv/table.st)") == "union"


@pytest.mark.parametrize("number", ["+1000000", "1_000_000", "1e6", "65"])
def test_a_number_is_bounded_however_it_is_spelled(server: Live, number: str) -> None:
    answer = server.complete("a", speculation={"method": f"aggressive:block={number}"})
    assert answer.status == 400 and "at most 64" in answer.json["error"]["message"]


def test_what_cannot_fit_is_refused_unread(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 100_000
    read: list[int] = []
    encode = server.llm.tokenizer.encode
    monkeypatch.setattr(server.llm.tokenizer, "encode", lambda text, **given: read.append(len(text)) or encode(text, **given))
    for answer, field in (
        (server.complete(long), "prompt"),
        (server.complete("a", prediction={"content": long}), "prediction"),
        (server.chat(messages=[{"role": "user", "content": long}]), "messages"),
    ):
        assert answer.status == 400
        error = answer.json["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert max(read, default=0) < 1000


def test_a_reply_may_come_back_with_all_that_is_empty_in_it(server: Live) -> None:
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "reasoning": False}
    reply = {"role": "assistant", "content": "x", **empty}
    messages = [{"role": "user", "content": "hi"}, reply, {"role": "user", "content": "on"}]
    assert server.chat(messages=messages, max_tokens=2).status == 200
    for name, value in (("audio", "x"), ("annotations", [1]), ("reasoning", True)):
        assert server.chat(messages=[{**reply, name: value}], max_tokens=2).status == 400, name


def test_more_texts_are_embedded_than_may_wait(server: Live) -> None:
    answer = server.ask("POST", "/v1/embeddings", {"input": ["a", "b"] * 30})
    vectors = [one["embedding"] for one in answer.json["data"]]
    assert len(vectors) == 60 and vectors[0] == vectors[58] and vectors[1] == vectors[59] != vectors[0]


def test_refused_requests_count_as_none_that_ended(server: Live) -> None:
    def ended() -> list[str]:
        text = server.ask("GET", "/metrics").body.decode()
        return [
            line
            for line in text.splitlines()
            if line.startswith(("redraft:request_success_total", "redraft:e2e_request_latency_seconds_count"))
        ]

    before = ended()
    assert server.complete("a " * 300).status == 400
    assert ended() == before


def test_nothing_is_fetched_for_its_pages(server: Live) -> None:
    assert server.ask("GET", "/docs").status == 404 and server.ask("GET", "/redoc").status == 404
    server.idle()
