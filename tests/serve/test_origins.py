"""No foreign web page can use a server on loopback. Programs need no content type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused
from redraft.serve.origins import Origins
from tests.serve.raw import Live, live

JSON = {"content-type": "application/json"}


def allowed(config: dict[str, Any], headers: dict[str, str], method: str = "POST") -> bool:
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    scope: Any = {"method": method, "headers": list(raw.items())}
    refused = None
    try:
        Origins(ServeConfig(**config)).check(scope, raw)
    except Refused as error:
        refused = error.status
    assert refused in (None, 403)
    declared = dict(scope["headers"]).get(b"content-type")
    assert (declared is not None) == ("content-type" in headers or (method != "GET" and not refused))
    return not refused


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "127.1.2.3:9", "[::1]:8000", "LocalHost", "api.localhost:80", "llm.example.org"]
)
def test_hosts_of_a_server_on_loopback(host: str) -> None:
    assert allowed({"allow_origins": "https://llm.example.org"}, {"host": host, **JSON})


@pytest.mark.parametrize("host", ["evil.example:8000", "localhost.evil.example", "10.0.0.1", "[::1", "x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_hosts_are_refused(host: str, method: str) -> None:
    assert not allowed({}, {"host": host, **JSON}, method)
    assert not allowed({"host": "localhost"}, {"host": host, **JSON}, method)
    assert allowed({"host": "0.0.0.0"}, {"host": host, **JSON}, method)
    assert allowed({"allow_origins": "*"}, {"host": host, **JSON}, method)


def test_a_body_without_a_content_type_needs_an_origin_of_the_server() -> None:
    host = {"host": "localhost:8000"}
    assert allowed({}, host)
    assert allowed({}, {**host, "origin": "http://localhost:8000"})
    assert allowed({"allow_origins": "http://a.example"}, {**host, "origin": "http://a.example"})
    assert allowed({"allow_origins": "*"}, {**host, "origin": "http://a.example"})
    assert allowed({}, {**host, "origin": "http://a.example"}, "GET")
    for origin in ("http://a.example", "null", "http://localhost:9000"):
        assert not allowed({}, {**host, "origin": origin})
        assert not allowed({}, {**host, "origin": origin, "content-type": "text/plain"})
        assert allowed({}, {**host, "origin": origin, **JSON})  # a browser asks before it sends these


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


def raw(server: Live, path: str, *lines: str, body: bytes = b"") -> bytes:
    head = [f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", "Connection: close", *lines, "", ""]
    one = server.raw("\r\n".join(head).encode() + body)
    answer = b""
    while piece := one.recv(65_536):
        answer += piece
    return answer


def test_a_live_server(server: Live) -> None:
    body = b'{"prompt": "a"}'
    assert b" 200 " in raw(server, "/tokenize", "Host: localhost", body=body)
    refused = raw(server, "/tokenize", "Host: localhost", "Origin: http://a.example", body=body)
    assert b" 403 " in refused and b"permission_error" in refused
    assert b" 403 " in raw(server, "/reset_prefix_cache", "Host: localhost", "Origin: http://a.example")
    assert b" 403 " in raw(server, "/tokenize", "Host: a.example", "Content-Type: application/json", body=body)
    other = raw(server, "/tokenize", "Host: localhost", "Content-Type: text/plain", body=body)
    assert b" 400 " in other and b"content type" in other
