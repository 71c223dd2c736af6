"""Methods that a request may not choose."""

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


def test_no_place_on_the_machine_is_shown() -> None:
    assert public("draft", "copyspec:gamma=4") == "copyspec:gamma=4"
    assert public("draft", "token-recycling:path=/srv/table.st") == "token-recycling"
    assert public("draft", "union:parts=copyspec+(token-recycling:path=/srv/table.st)") == "union"


@pytest.mark.parametrize("number", ["+1000000", "1_000_000", "1e6", "65"])
def test_a_number_is_bounded_however_it_is_spelled(server: Live, number: str) -> None:
    answer = server.complete("a", speculation={"method": f"aggressive:block={number}"})
    assert answer.status == 400 and "at most 64" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("field", "choice"),
    [
        ("cache.keep", {"cache": {"keep": "scissorhands:budget=999999999999999999999"}}),
        ("cache.keep", {"cache": {"keep": "ada-kv:budget=99999999999999999999"}}),
        ("cache.keep", {"cache": {"keep": "streaming-llm:recent=1048577"}}),
        ("cache.keep", {"cache": {"keep": "ada-kv:floor=nan"}}),
        ("cache.codec", {"cache": {"codec": "int4:block=16777216"}}),
        ("cache.read", {"cache": {"read": "page-top-k:tokens=1e400"}}),
        ("speculation.verifier", {"speculation": {"verifier": "typical:eps=inf"}}),
        ("speculation.method", {"speculation": {"method": "rsd-c:branching=2x65"}}),
        ("speculation.method", {"speculation": {"method": "union:parts=copyspec+(rsd-s:width=1000000000)"}}),
        ("speculation.method", {"speculation": {"method": "union:parts=copyspec+(union:parts=copyspec+(copyspec:block=65))"}}),
    ],
)
def test_numbers_of_all_methods_are_bounded(server: Live, field: str, choice: dict[str, Any]) -> None:
    answer = server.complete("a", **choice)
    error = answer.json["error"]
    assert (answer.status, error["param"]) == (400, field)
    assert "is allowed" in error["message"] or "is needed" in error["message"]


@pytest.mark.parametrize("method", ["union:parts=" + "+".join(["copyspec"] * 9), "union:parts=union+union+union+union+union"])
def test_parts_are_bounded_those_of_defaults_too(server: Live, method: str) -> None:
    answer = server.complete("a", speculation={"method": method})
    assert answer.status == 400 and "at most 8 are allowed" in answer.json["error"]["message"]
    assert server.complete("a", speculation={"method": "union:parts=union+copyspec"}, max_tokens=1).status == 200


def test_lists_are_bounded(server: Live) -> None:
    hi = {"role": "user", "content": "hi"}
    part = {"type": "text", "text": "a"}
    call = {"function": {"name": "f", "arguments": "{}"}}
    for field, answer in (
        ("messages", server.chat(messages=[hi] * 4097)),
        ("messages.0.content", server.chat(messages=[{"role": "user", "content": [part] * 1025}])),
        ("messages.0.tool_calls", server.chat(messages=[{"role": "assistant", "content": "", "tool_calls": [call] * 129}])),
        ("prediction.content", server.chat(prediction={"type": "content", "content": [part] * 1025})),
        ("chat_template_kwargs", server.chat(chat_template_kwargs={f"a{i}": 1 for i in range(65)})),
        ("metadata", server.chat(metadata={str(i): "" for i in range(65)})),
        ("stop", server.complete("a", stop=["x"] * 17)),
        ("bad_words", server.complete("a", bad_words=["x"] * 65)),
        ("logit_bias", server.complete("a", logit_bias={str(i): 1 for i in range(4097)})),
        ("prompt", server.complete(["a"] * 21)),  # type: ignore[arg-type]
    ):
        error = answer.json["error"]
        assert (answer.status, error["param"]) == (400, field), error
        assert "at most" in error["message"]


def test_what_the_engine_cannot_open_is_refused(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(request: Any) -> None:
        raise OSError("/srv/secret")

    monkeypatch.setattr(server.llm.engine, "add", add)
    answer = server.complete("a", cache={"keep": "streaming-llm"})
    error = answer.json["error"]
    assert (answer.status, error["param"]) == (400, "cache") and "secret" not in error["message"]
    assert server.complete("a").status == 500  # the request chose nothing, so the server is at fault


def test_a_profile_that_is_missing_is_refused_without_its_path(server: Live) -> None:
    answer = server.complete("a", cache={"read": "double-sparsity"})
    error = answer.json["error"]
    assert (answer.status, error["param"]) == (400, "cache.read")
    assert error["message"].startswith("double-sparsity: no profile (path); ") and "/" not in error["message"]


@pytest.mark.parametrize(
    ("choice", "field", "said"),
    [
        ({"cache": {"keep": "razor"}}, "cache.keep", "razor: no profile (path); "),
        ({"cache": {"codec": "think"}}, "cache.codec", "think: no profile (path); "),
        ({"speculation": {"verifier": "judge"}}, "speculation.verifier", "judge: no judge is kept for this model; "),
        ({"cache": {"keep": "kvmerger:weights=sum"}}, "cache.keep", "kvmerger:weights='sum': must be gaussian, mean, pivot"),
        ({"cache": {"keep": "snapkv:budget=1,budget=0.2"}}, "cache.keep", "'snapkv:budget=1,budget=0.2': 'budget' is given twice"),
    ],
)
def test_an_error_names_the_field_of_its_method(server: Live, choice: dict[str, Any], field: str, said: str) -> None:
    answer = server.complete("a", **choice)
    error = answer.json["error"]
    assert (answer.status, error["param"]) == (400, field) and error["message"].startswith(said)


def test_a_request_may_choose_words(server: Live) -> None:
    assert server.complete("a", cache={"keep": "kvmerger:weights=mean"}).status == 200


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


def test_a_part_of_a_message_may_hold_empty_fields(server: Live) -> None:
    part = {"type": "text", "text": "hi", "annotations": [], "cache_control": None}
    assert server.chat(messages=[{"role": "user", "content": [part]}], max_tokens=2).status == 200
    assert server.chat(messages=[{"role": "user", "content": [{**part, "annotations": [1]}]}], max_tokens=2).status == 400


def test_half_of_a_surrogate_pair_beside_what_the_engine_refuses(server: Live) -> None:
    for more in ({"logit_bias": {"999999": 1}}, {"stop_token_ids": [99_999_999]}, {"cache": {"codec": "nothing"}}):
        answer = server.chat(max_tokens=2, chat_template_kwargs={"x": "\ud800"}, **more)
        assert answer.status == 400 and "surrogate" not in answer.json["error"]["message"], more


def test_half_of_a_surrogate_pair_that_a_template_prints() -> None:
    with live(chat_template="{{ note }}{{ messages[0].content }}") as made:
        answer = made.chat(max_tokens=2, chat_template_kwargs={"note": "\ud800"})
        assert answer.status == 400 and "half of a surrogate pair" in answer.json["error"]["message"]


def test_what_asks_for_nothing_counts_as_not_given(server: Live) -> None:
    nothing = {
        "stream_options": None,
        "response_format": None,
        "logit_bias": {},
        "stop": [],
        "tools": [],
        "functions": [],
        "frobnicate": None,
    }
    nothing |= {"cache": {"keep": None, "x": None}, "speculation": {"method": None}, "parallel_tool_calls": False, "top_logprobs": 0}
    nothing |= {"tool_choice": "none", "reasoning_effort": None, "web_search_options": False, "prediction": None, "audio": False}
    assert server.chat(max_tokens=2, **nothing).status == 200
    assert server.chat(max_tokens=2, stream=True, stream_options={"include_usage": None, "include_obfuscation": None}).status == 200
    assert server.chat(max_tokens=2, stream_options={"include_usage": False}).status == 200
    assert server.chat(max_tokens=2, prediction={"type": None, "content": "a"}).status == 200
    for name, value in (("frobnicate", False), ("tools", [{}]), ("best_of", True), ("use_beam_search", True), ("guided_json", {})):
        error = server.complete("a", **{name: value}).json["error"]
        assert error["param"] == name
    assert server.complete("a", best_of=1, suffix="").status == 200


def test_top_p_of_zero_is_the_likeliest_token(server: Live) -> None:
    given = {"temperature": 1.0, "seed": 3, "max_tokens": 8}
    assert server.alone("def add(", top_p=0, **given) == server.alone("def add(", temperature=0, max_tokens=8)


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
