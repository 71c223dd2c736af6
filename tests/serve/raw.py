"""A server in this process, on its own socket, and clients that misbehave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from redraft import LLM
from redraft.serve.config import ServeConfig
from redraft.serve.run import Server, server

PATIENCE = 300.0  # seconds; each test takes less


@cache
def embedded() -> LLM:
    """The embedded model over a small pool."""
    return LLM(max_model_len=160, cache_memory=24 << 20, threads=1)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self._response = response.status, response.headers, response

    @property
    def body(self) -> bytes:
        return self._response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> Iterator[str]:
        while line := self._response.readline():
            if text := line.decode().strip():
                yield text

    def events(self) -> list[Any]:
        """The data of all events of a stream, the comments left out."""
        return [text if (text := line[6:]) == "[DONE]" else json.loads(text) for line in self.lines() if line.startswith("data: ")]


class Live:
    def __init__(self, llm: LLM, served: Server, port: int) -> None:
        self.llm, self.served, self.port, self.service = llm, served, port, served.service
        self._open: list[Any] = []  # connections, closed at the end at the latest

    def close(self) -> None:
        for one in self._open:
            one.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Waits for the head of the answer only. Asks again where the machine was too busy to pass on the body in time."""
        answer = self._ask(method, path, body, headers)
        while answer.status == 408:
            answer = self._ask(method, path, body, headers)
        return answer

    def _ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        one = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        one.request(method, path, sent, {"Content-Type": "application/json", **headers})
        answer = Answer(one.getresponse())
        self._open += [one, answer._response]
        return answer

    def complete(self, prompt: str, **more: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **more})

    def chat(self, **more: Any) -> Answer:
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **more})

    def alone(self, prompt: str, **more: Any) -> str:
        """The server's bytes for a request on its own connection."""
        return str(self.complete(prompt, **more).json["choices"][0]["text"])

    def raw(self, data: bytes, **options: int) -> socket.socket:
        """options: of the socket, set before it connects."""
        one = socket.socket()
        self._open.append(one)
        one.settimeout(PATIENCE)
        for name, value in options.items():
            one.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        one.connect(("127.0.0.1", self.port))
        one.sendall(data)
        return one

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.005)

    def idle(self) -> None:
        """Nothing runs, and nothing is held."""
        engine = self.llm.engine
        self.until(lambda: not self.service.shell.busy and not engine.has_work and not engine.memory.used())
        engine.memory.check()
        assert not engine.outputs


def post(path: str, body: Any, *lines: str) -> bytes:
    sent = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(sent)}", *lines, "", ""]
    return "\r\n".join(head).encode() + sent


@contextmanager
def live(llm: LLM | None = None, **settings: Any) -> Iterator[Live]:
    """Runs until the block ends. Then it is shut down as by SIGTERM, unless it has ended."""
    llm = llm or embedded()
    served = server(llm, ServeConfig(access_log=False, log_level="critical", **settings))
    listening = socket.socket(proto=socket.IPPROTO_TCP)  # without the protocol asyncio does not disable Nagle's algorithm
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets inherit it
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    made = Live(llm, served, port)
    try:
        made.until(lambda: served.started)
        yield made
    finally:
        made.close()
        if thread.is_alive():
            served.handle_exit(15, None)
        thread.join(PATIENCE)
        listening.close()
        assert not thread.is_alive(), "the server did not end"
