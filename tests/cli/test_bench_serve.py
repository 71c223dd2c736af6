"""`redraft bench serve`, from the command line, against a server that misbehaves as each test needs."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from redraft.bench.load import workload
from tests.bench.fake_openai import FakeOpenAI
from tests.cli.conftest import Ran, start
from tests.cli.test_main import LIGHT

Fake = Callable[..., FakeOpenAI]
Redraft = Callable[..., Ran]


@pytest.fixture
def fake() -> Iterator[Fake]:
    opened: list[FakeOpenAI] = []

    def open_(**how: Any) -> FakeOpenAI:
        opened.append(FakeOpenAI(**how).__enter__())
        return opened[-1]

    yield open_
    for server in opened:
        server.__exit__()


def serve(redraft: Redraft, server: FakeOpenAI, path: Path, *arguments: str) -> tuple[int, str, str, dict[str, Any]]:
    code, out, err = redraft("bench", "serve", "--base-url", server.url, "--json", str(path), *arguments)
    return code, out, err, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_all_of_it(redraft: Redraft, fake: Fake, tmp_path: Path, endpoint: str) -> None:
    pytest.importorskip("matplotlib")
    server = fake(pieces=[" a b", " ☃ d e", " f"], metrics={"steps": 3, "drafted": 6, "accepted": 2}, bytes=endpoint == "chat")
    page = tmp_path / "out.html"
    given = f"--num-prompts 6 --rate 200 --input-len 40 --endpoint {endpoint} --temperature 0 --api-key s3cret --html {page}".split()
    given += ["--extra", '{"speculation": "off"}', "--goodput", "ttft:90000 e2el:90000"]
    code, out, err, found = serve(redraft, server, tmp_path / "out.json", *given)
    assert code == 0, err
    assert (found["completed"], found["failed"], found["model_id"], found["request_rate"]) == (6, 0, "fake-1", 200)
    assert (found["total_input_tokens"], found["total_output_tokens"], found["mean_tokens_per_chunk"]) == (240, 36, 2)
    assert (found["input_lengths"], found["input_tokens_as_wanted"], found["good"]) == ("tokens", 6, 6)
    assert found["redraft"] == {"requests": 6, "steps": 18, "drafted": 36, "accepted": 12, "mean_acceptance_length": pytest.approx(5 / 3)}
    assert "6 completed, 0 failed" in out and "exact, by the server's /tokenize; the server counted the same" in out
    assert server.keys == {"Bearer s3cret"} and "s3cret" not in out + err + json.dumps(found) + page.read_text()
    assert len(server.bodies) == 7 and len({json.dumps(body) for body in server.bodies}) == 7, "a warm-up that is none of the others"
    for i, body in enumerate(sorted(server.bodies[1:], key=lambda body: body["seed"])):
        assert (body["seed"], body["max_tokens"], body["temperature"], body["speculation"]) == (i, 64, 0, "off")
        assert body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    assert [base64.b64decode(one)[:8] for one in pictures] == [b"\x89PNG\r\n\x1a\n"] * 3


def test_the_page_needs_no_other_file_and_trusts_no_name(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, links = tmp_path / "out.html", []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            assert tag != "b", "the model's name is text"
            links.extend(value for name, value in attributes if name in ("src", "href") and not value.startswith("data:"))

    given = ["--num-prompts", "2", "--model", "<b>x", "--html", str(page)]
    code, _, err, found = serve(redraft, fake(error="<b>[bold]"), tmp_path / "out.json", *given)
    Links().feed(page.read_text())
    assert (code, found["model_id"], links) == (1, "<b>x", []) and "<b>[bold]" in err


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"status": 429, "words": "busy [/]"}, "HTTP 429", "busy [/]"),
    ({"status": 500}, "HTTP 500", "not now"),
    ({"error": "no pages"}, "error event", "no pages"),
    ({"cut": 2}, "cut short", ""),
    ({"ended": False}, "cut short", "the stream ended before the text did"),
    ({"hang": True}, "timeout", "no end within 2 s"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), FAULTS, ids=[f"{kind}-{i}" for i, (_, kind, _) in enumerate(FAULTS)])
def test_failures_are_counted_by_kind(redraft: Redraft, fake: Fake, tmp_path: Path, fault: dict[str, Any], kind: str, words: str) -> None:
    """All fail: exit code 1 with the first error."""
    given = ["--num-prompts", "3", "--warmups", "0", "--timeout", "2" if "hang" in fault else "300"]
    given += ["--extra", json.dumps({"fake": fault})]
    code, out, err, found = serve(redraft, fake(), tmp_path / "out.json", *given)
    assert (code, found["completed"], found["failed"], found["failures"]) == (1, 0, 3, {kind: 3})
    assert err.splitlines()[-1].startswith(f"error: all 3 requests failed, the first: {kind}: {words}")
    assert f"failed, 3 times {kind}: {words}" in out and found["mean_ttft_ms"] is None


def test_some_failures_are_reported_and_the_rest_is_measured(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    class Every3rd(FakeOpenAI):
        async def _stream(self, request: Any, body: dict[str, Any], how: dict[str, Any]) -> Any:
            return await super()._stream(request, body, how | ({"status": 429} if body["seed"] % 3 == 0 else {}))

    with Every3rd() as server:
        code, out, _, found = serve(redraft, server, tmp_path / "out.json", "--num-prompts", "6", "--warmups", "1")
    assert (code, found["completed"], found["failed"], found["failures"]) == (0, 4, 2, {"HTTP 429": 2})
    assert (found["total_output_tokens"], found["total_input_tokens"]) == (4 * 64, 4 * 128), "of those that were answered"
    assert "failed, 2 times HTTP 429: not now" in out and "1 of the warm-ups failed" in out


def test_no_server_is_one_line(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    with FakeOpenAI() as server:
        pass
    code, out, err, _ = serve(redraft, server, tmp_path / "out.json")
    assert (code, out) == (1, "") and err.startswith(f"error: {server.url}/v1/models: ") and err.count("\n") == 1
    code, out, err, found = serve(redraft, server, tmp_path / "out.json", "--model", "x", "--num-prompts", "2", "--warmups", "0")
    assert (code, found["failures"]) == (1, {"connection": 2}) and "the first: connection: " in err


def test_output_tokens_without_usage(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    """Counted by the server's tokenizer, without the token before a text; else one for each chunk. The report says which."""
    given = ["--num-prompts", "2", "--extra", '{"fake": {"usage": false, "pieces": [" a b c", " d"]}}']
    _, out, _, found = serve(redraft, fake(), tmp_path / "a.json", *given)
    assert (found["total_output_tokens"], found["output_tokens_from"]) == (8, {"tokenize": 2}) and "counted by its /tokenize" in out
    _, out, _, found = serve(redraft, fake(tokenizer="none"), tmp_path / "b.json", *given)
    assert (found["total_output_tokens"], found["output_tokens_from"]) == (4, {"chunks": 2}) and "one for each chunk, which may be" in out
    assert found["input_lengths"] == "words"


def test_a_tokenizer_of_letters_gets_letters(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    server = fake(tokenizer="letters")
    _, _, _, found = serve(redraft, server, tmp_path / "out.json", "--num-prompts", "3", "--input-len", "50")
    assert (found["input_lengths"], found["total_input_tokens"]) == ("tokens", 150)
    assert server.tokenized < 2 + len(workload.WORDS) + len(workload.LETTERS) + 1


def test_words_that_join_to_fewer_tokens_are_not_called_exact(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    _, out, _, found = serve(redraft, fake(tokenizer="joined"), tmp_path / "out.json", "--num-prompts", "2")
    assert (found["input_lengths"], found["input_tokens_as_wanted"]) == ("words", 0) and "just as many in 0 of 2 prompts" in out


def test_fields_of_extra_are_over_all_others(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    server = fake()
    serve(redraft, server, tmp_path / "out.json", "--num-prompts", "1", "--extra", '{"seed": 70, "max_tokens": 2, "stream_options": null}')
    assert all((body["seed"], body["max_tokens"], body["stream_options"]) == (70, 2, None) for body in server.bodies)


def test_a_stream_may_lack_its_last_empty_line(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    given = ["--num-prompts", "1", "--extra", '{"fake": {"ended": false, "tail": "data: [DONE]"}}']
    assert serve(redraft, fake(), tmp_path / "out.json", *given)[3]["completed"] == 1


def test_closed_loop_keeps_its_number_in_flight(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    server = fake()
    _, out, _, found = serve(redraft, server, tmp_path / "out.json", "--num-prompts", "9", "--concurrency", "3")
    assert server.most <= 3 and found["completed"] == 9 and found["max_concurrent_requests"] <= 3
    assert (found["request_rate"], found["max_concurrency"], found["max_lag_ms"]) == ("inf", 3, None)
    assert "a new one when one has ended" in out


def test_no_answer_holds_up_the_next_request(redraft: Redraft, fake: Fake, tmp_path: Path) -> None:
    """No stream continues before all requests have arrived, so a client that waits for an answer would time out."""
    server = fake(gate=True)
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,input,output\n" + "".join(f"{i},{20 + i},3\n" for i in range(20)))

    class Opens(list[Any]):
        def append(self, body: Any) -> None:
            super().append(body)
            if len(self) == 20:
                server.gate.set()

    server.bodies = Opens()
    given = ["--trace", str(trace), "--trace-scale", "100", "--warmups", "0", "--timeout", "300"]
    code, _, _, found = serve(redraft, server, tmp_path / "out.json", *given)
    assert (code, found["completed"], found["total_output_tokens"], found["request_rate"]) == (0, 20, 60, None)
    assert found["total_input_tokens"] == sum(range(20, 40)) and found["max_concurrent_requests"] == 20


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_prints_and_exits_130(fake: Fake, tmp_path: Path) -> None:
    """Two of three requests hang. Results are written, unfinished requests are counted, and the server sees them leave."""

    class First(FakeOpenAI):
        async def _stream(self, request: Any, body: dict[str, Any], how: dict[str, Any]) -> Any:
            return await super()._stream(request, body, how | {"hang": body["seed"] > 0})

    out = tmp_path / "out.json"
    with First() as server:
        given = f"--base-url {server.url} --num-prompts 3 --warmups 0 --concurrency 2 --json {out}".split()
        process = start("bench", "serve", *given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(lambda: len(server.bodies) == 3 and server.active == 2)  # the third is sent when the first has ended
        process.send_signal(signal.SIGINT)
        reported, err = process.communicate(timeout=300)
        until(lambda: server.active == 0)
    assert process.returncode == 130, err
    assert b"1 completed, 0 failed, 2 not finished when interrupted" in reported and b"Traceback" not in err
    found = json.loads(out.read_text())
    assert (found["interrupted"], found["completed"], found["unfinished"], found["total_output_tokens"]) == (True, 1, 2, 64)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_needs_no_pytorch(fake: Fake) -> None:
    """The client imports nothing heavy, because the server may run on the same machine."""
    given = ["bench", "serve", "--base-url", fake().url, "--num-prompts", "1"]
    done = subprocess.run([sys.executable, "-c", LIGHT, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 completed" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--rate", "0"], "rate = 0: requests a second above 0, or inf, are needed"),
        (["--rate", "nan"], "rate = nan"),
        (["--concurrency", "0"], "concurrency = 0: must be 1 or more"),
        (["--num-prompts", "0"], "num-prompts = 0"),
        (["--warmups", "-1"], "warmups = -1: must be 0 or more"),
        (["--trace", "x.csv", "--rate", "2"], "rate = 2.0: not together with trace"),
        (["--trace", "x.csv", "--shared-prefix", "2"], "shared-prefix = 2: not together with trace"),
        (["--prompts", "x.jsonl", "--input-len", "2"], "input-len = 2: not together with prompts"),
        (["--trace-scale", "2"], "trace-scale = 2: only with trace"),
        (["--groups", "2"], "groups = 2: only with shared-prefix"),
        (["--trace", "none.csv"], "trace = none.csv: cannot be read"),
        (["--prompts", "none.jsonl"], "prompts = none.jsonl: cannot be read"),
        (["--endpoint", "embeddings"], "endpoint = embeddings: completions or chat is needed"),
        (["--base-url", "localhost:8000"], "base-url = localhost:8000: http://HOST:PORT"),
        (["--extra", "[1]"], "extra = '[1]': a JSON object is needed"),
        (["--goodput", "itl:5"], "goodput = 'itl:5'"),
        (["--timeout", "0"], "timeout = 0"),
        (["--json", "none/a.json"], "json = none/a.json: there is no folder none"),
        (["--html", "none/a.html"], "html = none/a.html: there is no folder none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line(redraft: Redraft, arguments: list[str], reported: str) -> None:
    code, out, err = redraft("bench", "serve", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and reported in err, err


def test_messages_are_for_chats(redraft: Redraft, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert "messages are for --endpoint chat" in redraft("bench", "serve", "--prompts", str(path))[2]
