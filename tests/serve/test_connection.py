"""Clients that close their sending side, and ambiguous requests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.serve.raw import Live, live, post

BODY = {"prompt": "def add(", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(keep_alive=0.03) as made:
        yield made


def everything(one: socket.socket) -> bytes:
    answer = b""
    while piece := one.recv(65_536):
        answer += piece
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_half_closes_gets_its_answer(server: Live, stream: bool) -> None:
    expected = server.ask("POST", "/v1/completions", BODY, Connection="close").json["choices"][0]["text"]
    one = server.raw(post("/v1/completions", {**BODY, "stream": stream}))
    one.shutdown(socket.SHUT_WR)
    head, _, body = everything(one).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.count(b"HTTP/1.1") == 1
    if stream:
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["text"] for event in events)
        assert b"data: [DONE]" in body
    else:
        text = json.loads(body)["choices"][0]["text"]
    assert text == expected
    server.until(lambda: not server.served.server_state.connections)
    server.idle()


def test_errors_are_answered_to_it_too(server: Live) -> None:
    one = server.raw(post("/v1/completions", {"prompt": 5}))
    one.shutdown(socket.SHUT_WR)
    assert everything(one).startswith(b"HTTP/1.1 400 ")
    one = server.raw(post("/v1/completions", BODY)[:-9])
    one.shutdown(socket.SHUT_WR)
    assert everything(one) == b""  # half a request


def test_two_lengths_end_the_connection(server: Live) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
    body = b'f\r\n{"prompt": "a"}\r\n0\r\n\r\n'
    answer = everything(
        server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    )
    assert answer.startswith(b"HTTP/1.1 400 ") and b"exclude each other" in answer
    assert answer.count(b"HTTP/1.1") == 1  # what follows is not read
