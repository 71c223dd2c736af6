"""A server survives impatient, slow, silent and misbehaving clients, requests with failing methods, a dead engine, and signals."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from redraft.kv.eviction.streaming_llm import Streaming
from tests.serve.conftest import Clock
from tests.serve.raw import Live, embedded, live, post

LONG = {"max_tokens": 140, "stop": None}
PROMPTS = ("def add(", "The cat sat on", "import numpy as", "Once upon a time")


class Brake:
    """While it is on, steps do nothing. Tests of running requests need one that does not end."""

    def __init__(self, engine: Any) -> None:
        self.held, self.steps, self.inner = False, 0, engine.step
        engine.step = self._step  # plain attribute over the method

    def _step(self, *given: Any) -> Any:
        if self.held:
            time.sleep(0.001)
            return []
        self.steps += 1
        return self.inner(*given)

    def on(self) -> None:
        self.held = True

    def off(self) -> None:
        self.held = False


@pytest.fixture
def brake() -> Iterator[Brake]:
    made = Brake(embedded().engine)
    yield made
    made.off()
    del embedded().engine.step


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(max_queue=3, max_body=20_000, keep_alive=0.03) as made:
        yield made


# ---- access and limits


def test_the_queue_is_bounded_and_says_when_to_come_back(server: Live, brake: Brake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three may wait in addition to the one that can run."""
    monkeypatch.setattr(server.llm.engine, "scheduler", replace(server.llm.engine.scheduler, max_seqs=1))
    brake.on()
    waiting = [server.raw(post("/v1/completions", {"prompt": prompt, "max_tokens": 2})) for prompt in (*PROMPTS[:3], "one")]
    server.until(lambda: server.service.shell.queued == 4)
    refused = server.complete("one more")
    assert refused.status == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json["error"]["type"] == "rate_limit_error"
    brake.off()
    for one in waiting:
        assert one.recv(12) == b"HTTP/1.1 200"
        one.close()
    assert server.complete("room again").status == 200
    server.idle()


def test_a_body_that_is_too_large_is_refused_reported_or_not(server: Live) -> None:
    got = server.ask("POST", "/tokenize", {"prompt": "a" * 30_000})
    assert got.status == 413 and got.json["error"]["type"] == "invalid_request_error"
    chunks = b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
    one = server.raw(
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    )
    assert one.recv(12) == b"HTTP/1.1 413"
    one.close()


def test_whoever_waits_for_leave_to_send_too_much_is_reported_at_once(server: Live) -> None:
    one = server.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 90000\r\n\r\n")
    assert one.recv(12) == b"HTTP/1.1 413"
    one.close()


def test_keys() -> None:
    with live(api_key=("first-key", "second-key")) as made:
        refused = made.complete("x")
        assert refused.status == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        body = refused.body.decode()
        assert "authentication_error" in body and "-key" not in body
        for wrong in ("Bearer first-ke", "Bearer", "Basic first-key", "first-key", "Bearer first-key second-key", "Bearer \xe9"):
            assert made.ask("GET", "/v1/models", Authorization=wrong).status == 401, wrong
        for right in ("Bearer first-key", "bearer second-key"):
            assert made.ask("GET", "/v1/models", Authorization=right).status == 200, right
        assert made.ask("GET", "/health").status == made.ask("GET", "/ready").status == made.ask("GET", "/metrics").status == 200


def test_every_key_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("redraft.serve.limits.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    with live(api_key=("first-key", "second-key")) as made:
        assert made.ask("GET", "/v1/models", Authorization="Bearer first-key").status == 200
    assert compared == [(b"first-key", b"first-key"), (b"first-key", b"second-key")]


def test_each_key_and_salt_has_a_prefix_cache_of_its_own() -> None:
    prompt = "one two three four five six seven eight nine ten " * 8
    with live(api_key=("first", "second")) as made:

        def cached(key: str, salt: str | None = None) -> int:
            body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
            answer = made.ask("POST", "/v1/completions", body, Authorization=f"Bearer {key}").json
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        made.llm.engine.memory.paged.table.forget()
        assert cached("first") == 0 and cached("first") > 0
        assert cached("second") == 0 and cached("second") > 0
        assert cached("first", "a") == 0 and cached("first", "a") > 0 and cached("first", "b") == 0
        made.idle()


# ---- slow and silent clients


@pytest.fixture(scope="module")
def hasty() -> Iterator[Live]:
    with live(idle_timeout=0.3, keep_alive=0.03) as made:
        yield made


def test_a_slow_body(hasty: Live) -> None:
    one = hasty.raw(b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"pro')
    answer = everything(one)
    assert answer.startswith(b"HTTP/1.1 408") and b"timeout_error" in answer


def test_a_slow_head_however_it_trickles(hasty: Live) -> None:
    answer = b""
    while not answer:  # on a busy machine the connection may end before its first byte
        answer = trickled(hasty.raw(b"POST /tokenize HTTP/1.1\r\n"))
    assert answer.startswith(b"HTTP/1.1 408") and b"timeout_error" in answer


def trickled(one: socket.socket) -> bytes:
    """The answer to a head that goes on slowly."""
    answer = b""
    for letter in b"X-Long: " + b"y" * 1000:
        try:
            one.sendall(bytes([letter]))
        except OSError:
            break
        time.sleep(0.01)
        one.setblocking(False)
        try:
            if answer := one.recv(4096):
                break
            break
        except BlockingIOError:
            pass
        except ConnectionError:
            break
        one.setblocking(True)
    one.close()
    return answer


def test_idle_connections_are_closed(hasty: Live) -> None:
    assert everything(hasty.raw(b"")) == b""
    answer = b""
    while not answer.startswith(b"HTTP/1.1 200"):  # and then the end of the file
        answer = everything(hasty.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert answer[9:12] in (b"200", b"408", b"")  # on a busy machine the head may come too late


def everything(one: socket.socket) -> bytes:
    """Until the server closes."""
    answer = b""
    while piece := one.recv(65_536):
        answer += piece
    one.close()
    return answer


def test_nonsense_is_answered_in_the_form_of_errors(server: Live) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"):
        answer = everything(server.raw(nonsense))
        assert answer.startswith(b"HTTP/1.1 400") and b'"invalid_request_error"' in answer
    assert everything(server.raw(b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000)).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_does_not_read_is_dropped(hasty: Live, brake: Brake, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    body = {"prompt": "def add(", "max_tokens": 140, "ignore_eos": True, "logprobs": 20, "stream": stream, "n": 8}
    brake.on()
    with monkeypatch.context() as patched:
        patched.setattr(hasty.served.config.http_protocol_class, "idle_timeout", 60.0)  # a busy machine passes on the head late
        one = hasty.raw(post("/v1/completions", body), SO_RCVBUF=2048)
        hasty.until(lambda: hasty.service.shell.busy > 0)
    brake.off()
    hasty.idle()
    hasty.until(lambda: not hasty.served.server_state.connections)
    answer = everything(one)  # what its kernel had taken already
    assert answer.startswith(b"HTTP/1.1 200") and not answer.endswith((b"0\r\n\r\n", b"}"))


# ---- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_holds_nothing_behind_the_step_under_way(server: Live, brake: Brake, stream: bool) -> None:
    engine = server.llm.engine
    one = server.raw(post("/v1/completions", {"prompt": "def add(", "max_tokens": 140, "ignore_eos": True, "stream": stream}))
    server.until(lambda: engine.memory.used() > 0)
    brake.on()
    assert engine.running
    one.close()
    server.idle()  # without a further step


# ---- time


def test_a_request_that_takes_too_long(brake: Brake) -> None:
    with live(request_timeout=0.3) as made:
        brake.on()
        whole = made.complete("def add(", **LONG)
        assert whole.status == 504 and whole.json["error"]["type"] == "timeout_error"
        brake.off()
        made.idle()


def test_a_stream_that_takes_too_long(server: Live, brake: Brake, clock: Clock) -> None:
    brake.on()
    answer = server.complete("def add(", stream=True, **LONG)
    assert next(answer.lines()) == ": still at work"
    clock.ahead = 3600.0
    got = answer.events()
    assert got[-2]["error"]["type"] == "timeout_error" and got[-1] == "[DONE]"
    brake.off()
    server.idle()


def test_signs_of_life_while_there_is_nothing_to_tell(server: Live, brake: Brake) -> None:
    brake.on()
    lines = server.complete("def add(", stream=True).lines()
    assert [next(lines) for _ in range(3)] == [": still at work"] * 3
    brake.off()
    assert list(lines)[-1] == "data: [DONE]"


def test_the_clock_may_jump(server: Live, brake: Brake, monkeypatch: pytest.MonkeyPatch) -> None:
    brake.on()
    lines = server.complete("def add(", stream=True).lines()
    assert next(lines) == ": still at work"
    now = time.time
    for hours in (10_000, -10_000):
        monkeypatch.setattr(time, "time", lambda jump=hours * 3600: now() + jump)
        assert next(lines) == ": still at work"
    brake.off()
    rest = list(lines)
    assert rest[-1] == "data: [DONE]" and not any("error" in line for line in rest)


# ---- requests with failing methods


def together(server: Live, spoiled: Any, neighbours: list[str]) -> tuple[Any, list[str]]:
    """A request that fails among others: its answer and their texts."""
    found: dict[str, Any] = {}

    def ask(name: str, task: Any) -> None:
        found[name] = task()

    threads = [threading.Thread(target=ask, args=(prompt, lambda p=prompt: server.alone(p))) for prompt in neighbours]
    brake = Brake(server.llm.engine)
    brake.on()
    for one in threads:
        one.start()
    try:
        server.until(lambda: server.service.shell.busy == len(threads))
        own = threading.Thread(target=ask, args=("", spoiled))
        own.start()
        server.until(lambda: server.service.shell.busy == len(threads) + 1 or not own.is_alive())
    finally:
        brake.off()
    for one in (*threads, own):
        one.join(60)
    del server.llm.engine.step
    return found[""], [found[prompt] for prompt in neighbours]


@pytest.mark.parametrize("stream", [True, False])
def test_logits_that_are_no_numbers_end_their_own_request(server: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    alone = [server.alone(prompt) for prompt in PROMPTS[:2]]
    engine = server.llm.engine
    distribution = engine.sampler.distribution

    def spoiled(out: Any, batch: Any, work: Any, trees: Any) -> Any:
        for s, one in enumerate(work):
            if one.seq.params.top_k == 7 and one.done and one.seq.generated >= 3:
                rows = [batch.roots[s] + i for i in range(1 + len(trees[s]))]
                out.argmax[rows] = -1
        return distribution(out, batch, work, trees)

    monkeypatch.setattr(engine.sampler, "distribution", spoiled)
    answer, texts = together(server, lambda: failed(server.complete("def add(", top_k=7, stream=stream)), list(PROMPTS[:2]))
    assert answer["error"]["code"] == "not_a_number"
    assert texts == alone
    server.idle()


def failed(answer: Any) -> Any:
    """The error of an answer: 500, or the event of a stream, followed by its end."""
    if answer.status != 200:
        assert answer.status == 500
        return answer.json
    events = answer.events()
    assert events[-1] == "[DONE]" and all("choices" in event for event in events[:-2])
    return events[-2]


@pytest.mark.parametrize("where", ["begin", "sync_point", "sync_point later", "observe", "decide", "end", "watch"])
def test_a_keep_policy_that_raises_ends_its_own_request(server: Live, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    alone = [server.alone(prompt) for prompt in PROMPTS[:2]]
    right = Streaming.sync_point
    late = lambda self, seq: right(self, seq) if not seq.stored and not seq.state else raising()  # noqa: E731
    monkeypatch.setattr(Streaming, where.split()[0], late if "later" in where else raising)
    choice = {"cache": {"keep": "streaming-llm:sinks=2,recent=16"}}
    ask = lambda: server.complete("def add(", **choice)  # noqa: E731
    answer, texts = together(server, ask, list(PROMPTS[:2]))
    body = answer.body.decode()
    if where == "end":
        assert answer.status == 200  # the text was whole
    else:
        assert answer.status == 500 and '"internal error"' in body
    assert "surprise" not in body and texts == alone
    server.idle()


def raising(*given: Any) -> Any:
    raise ValueError("surprise in /etc/passwd")


def test_a_drafter_that_raises_costs_its_text_the_drafts_alone(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft.draft.copyspec import CopySpec

    alone = [server.alone(prompt) for prompt in PROMPTS[:3]]
    monkeypatch.setattr(CopySpec, "propose", raising)
    ask = lambda: server.complete(PROMPTS[2], speculation={"method": "copyspec:gamma=3"})  # noqa: E731
    answer, texts = together(server, ask, list(PROMPTS[:2]))
    got = answer.json
    assert [*texts, got["choices"][0]["text"]] == alone
    assert got["metrics"]["faults"] and "Traceback" not in str(got)
    server.idle()


# ---- the end


class Sudden(BaseException):
    pass


def test_a_dead_engine_ends_all_requests_and_ends_the_process(brake: Brake, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(keep_alive=0.03) as made:
        brake.on()
        streams = [made.complete(prompt, stream=True) for prompt in PROMPTS]
        probe = made.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in probe.recv(4096)

        def die(*given: Any) -> Any:
            raise Sudden("power")

        monkeypatch.setattr(brake, "inner", die)
        held = threading.Event()
        shutdown = made.served.shutdown

        async def later(sockets: Any = None) -> None:
            import asyncio

            await asyncio.to_thread(held.wait, 30)
            await shutdown(sockets)

        monkeypatch.setattr(made.served, "shutdown", later)
        brake.off()
        for one in streams:
            events = one.events()
            assert events[-2]["error"] == {"message": "the engine stopped", "type": "server_error", "param": None, "code": None}
            assert events[-1] == "[DONE]"
        assert made.ask("GET", "/health").status == made.ask("GET", "/ready").status == 503
        assert made.complete("anybody?").status == 503
        held.set()
        made.until(lambda: not made.served.server_state.connections)
        probe.close()
    assert made.served.dead
    engine = embedded().engine
    for name in [seq.request.id for seq in (*engine.waiting, *engine.running)]:
        engine.abort(name)


def test_a_signal_lets_streams_finish_and_refuses_what_is_new(brake: Brake) -> None:
    with live(keep_alive=0.03, shutdown_timeout=60) as made:
        alone = made.alone("def add(")
        brake.on()
        stream = made.complete("def add(", stream=True)
        made.served.handle_exit(15, None)
        refused = made.complete("too late")
        assert refused.status == 503 and int(refused.headers["Retry-After"]) > 0
        assert made.ask("GET", "/ready").status == 503 and made.ask("GET", "/health").status == 200
        brake.off()
        events = stream.events()
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == alone and events[-1] == "[DONE]"
    assert not made.served.dead


def test_a_second_signal_ends_streams_with_an_event(brake: Brake) -> None:
    with live(keep_alive=0.03, shutdown_timeout=3600) as made:
        brake.on()
        stream = made.complete("def add(", stream=True)
        made.served.handle_exit(15, None)
        made.served.handle_exit(15, None)
        events = stream.events()
        assert events[-2]["error"]["type"] == "service_unavailable_error" and events[-1] == "[DONE]"
    assert not made.served.dead and not embedded().engine.has_work


def test_patience_with_streams_has_an_end(brake: Brake) -> None:
    with live(keep_alive=0.03, shutdown_timeout=0.2) as made:
        brake.on()
        stream = made.complete("def add(", stream=True)
        made.served.handle_exit(15, None)
        events = stream.events()
        assert events[-2]["error"]["type"] == "service_unavailable_error" and events[-1] == "[DONE]"
        brake.off()
