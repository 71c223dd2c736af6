"""The server against malformed requests. `redraft serve` runs as a process of its own. First schemathesis tests it against its own
OpenAPI document. Then malformed bodies follow: truncated JSON, huge numbers, NaN, invalid UTF-8, halves of surrogate pairs, a wrong
type at every field of the document, 100,000 levels of nesting, 10 MB strings, wrong content types, broken chunks, wrong lengths.

Each must be answered by 4xx in the form of the document, without internal details (no path, trace or key). After each hundred, a good
request must be answered with the text that the engine writes without a server. At the end no request runs, no page is held, and the
process is not much larger than after the first fifth.

The check positive_data_acceptance of schemathesis is left out, because no schema can express that token ids lie within the vocabulary
or that a prompt fits into the context. Of duplicate keys the last counts, as in every JSON parser in use, so there the last one is
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = "positive_data_acceptance"
PROMPT, NEW = "def add(", 16
GOOD = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
LEAKS = re.compile(r'(?<![#\w])/|Traceback|File "|\.py\b')  # no body sent below has any of them
WRONG = (None, True, 7, -1.5, "x", "7", [], [[]], {}, {"x": 1}, [None], ["x", {}])
NUMBERS = ("1e400", "-1e400", "1" * 400, "9" * 5000, "-" + "9" * 30, "1e-5000", "NaN", "Infinity", "-Infinity")
DEPTH, LARGE = 100_000, 10_000_000


class Malformed(NamedTuple):
    """A request to `path`. chunks: the body is sent in chunks, each with its size; raw: head and body as they are, if the framing itself
    is wrong."""

    kind: str
    path: str
    body: bytes
    content_type: str | None = "application/json"
    chunks: bool = False
    raw: bytes = b""


class Slot(NamedTuple):
    """A place in a body, and the JSON types that are allowed there."""

    path: str
    place: tuple[str | int, ...]
    types: frozenset[str]


SAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a b", "max_tokens": 2, "stop": ["x"], "logit_bias": {"3": 1.0}, "stream_options": None},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/score": {"text_1": "a", "text_2": ["b", "c"]},
    "/v1/score": {"queries": "a", "documents": ["b", "c"]},
    "/rerank": {"query": "a", "documents": ["b", {"text": "c"}]},
    "/v1/rerank": {"query": "a", "documents": ["b"], "top_n": 1},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "a b"},
    "/detokenize": {"tokens": [3, 4]},
    "/api/generate": {"model": "embedded", "prompt": "a b", "stream": False, "options": {"num_predict": 2}},
    "/api/chat": {"model": "embedded", "messages": [{"role": "user", "content": "hi"}], "stream": False, "options": {"num_predict": 2}},
    "/api/embed": {"model": "embedded", "input": ["a", "b"]},
    "/api/show": {"model": "embedded"},
    "/completion": {"prompt": "a b", "n_predict": 2, "logit_bias": [[3, 1.0]]},
    "/completions": {"prompt": ["a", "b"], "n_predict": 2},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 2},
    "/apply-template": {"messages": [{"role": "user", "content": "hi"}]},
}
LACKED = ("/infill",)  # samples that the embedded model cannot answer
ERRORS = {  # begin of a path -> the fields of its errors; none for a text alone
    "/api/": frozenset(), "/v1/messages": frozenset({"message", "type"}),
    **dict.fromkeys(("/completion", "/infill", "/apply-template"), frozenset({"code", "message", "type"})),
    "": frozenset({"message", "type", "param", "code"}),
}  # fmt: skip


def slots(document: dict[str, Any]) -> list[Slot]:
    """Every field of every body, including those of nested objects and the items of lists."""
    from redraft.serve.limits import ADMIN

    parts, found = document["components"]["schemas"], dict[tuple[str, tuple[str | int, ...]], frozenset[str]]()

    def alternatives(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in schema:
            yield from alternatives(parts[schema["$ref"].rsplit("/", 1)[1]])
        elif several := schema.get("anyOf") or schema.get("oneOf"):
            for one in several:
                yield from alternatives(one)
        else:
            yield schema

    def walk(path: str, place: tuple[str | int, ...], schema: dict[str, Any], *more: str) -> None:
        several = list(alternatives(schema))
        types = frozenset(kind for one in several for kind in _types(one))
        if place and types:
            found[path, place] = types.union(found.get((path, place), ()), more)
        forms = [one["properties"] for one in several if "properties" in one]
        for form in forms:
            for name, inner in form.items():
                walk(path, (*place, name), inner, *(["null"] if any(name not in other for other in forms) else []))
        for one in several:
            if isinstance(one.get("items"), dict) and len([other for other in several if "items" in other]) == 1:
                walk(path, (*place, 0), one["items"])

    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None and path not in ADMIN:  # which need a key that this server does not have
            walk(path, (), body["content"]["application/json"]["schema"])
    return [Slot(path, place, types) for (path, place), types in found.items()]


def _types(schema: dict[str, Any]) -> list[str]:
    if "const" in schema or "enum" in schema:
        return ["enum", "null"] if None in schema.get("enum", ()) else ["enum"]
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def _fits(value: Any, types: frozenset[str]) -> bool:
    """Whether a value may be valid for these types. Such a value is not sent."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types
        case str():
            return "string" in types
        case list():
            return "array" in types
    return "object" in types


def _put(path: str, place: tuple[str | int, ...], value: str) -> str:
    """The sample of the path with raw JSON at a place, which is created if it does not exist."""
    mark = "@@@"
    whole = json.loads(json.dumps(SAMPLES[path]))
    if path == "/tokenize" and place[0] in ("messages", "content"):
        whole.pop("prompt")
    at: Any = whole
    for part, after in zip(place, (*place[1:], None), strict=True):
        new = mark if after is None else [] if isinstance(after, int) else {}
        if isinstance(at, list):
            assert isinstance(part, int)
            at[:] = [at[0] if at and isinstance(at[0], type(new)) and after is not None else new]
        elif after is None or not isinstance(at.get(part), type(new)):
            at[part] = new
        at = at[part]
    return json.dumps(whole).replace(f'"{mark}"', value)


def _cut(rng: random.Random, path: str) -> bytes:
    text = json.dumps(SAMPLES[path]).encode()
    return text[: rng.randrange(1, len(text) - 1)]


def _chunked(body: bytes, size: int = 7) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]).encode()


def malformed(document: dict[str, Any], count: int, seed: int, *, large: int = LARGE, key: str = "") -> Iterator[Malformed]:
    """`count` bodies. The kinds take turns; costly ones are rare."""
    from redraft.serve.schema import LACKING

    rng, places = random.Random(seed), slots(document)
    keys = (f"Authorization: Bearer {key}",) if key else ()
    rng.shuffle(places)
    wrong = (
        (slot, value)
        for _ in iter(int, 1)
        for slot in places
        for value in WRONG
        if not _fits(value, slot.types) and not (value == [] and slot.place[0] in LACKING)  # which counts as not given
    )
    texts = [slot for slot in places if "string" in slot.types]
    free = {("chat_template_kwargs",), ("metadata",), ("logit_bias",)}  # objects with free keys

    def costly(turn: int) -> Malformed:
        path = rng.choice(list(SAMPLES))
        slot = rng.choice(texts)
        match turn % 4:
            case 0:
                return Malformed("large", slot.path, _put(slot.path, slot.place, '"' + "a" * large + '"').encode(), chunks=turn % 8 > 3)
            case 1:
                opening, closing = rng.choice(["[]", ["{" + '"a":', "}"]])
                inside = opening * DEPTH + ("1" + closing * DEPTH if rng.random() < 0.7 else "")
                return Malformed("nested", path, inside.encode())
            case 2:
                inside = "[" * DEPTH + "]" * DEPTH
                return Malformed("nested", slot.path, _put(slot.path, slot.place, inside).encode())
            case _:
                body = json.dumps(SAMPLES[path]).encode()
                late = rng.choice(["Content-Length: 100000", "Transfer-Encoding: chunked"])
                start = b"" if "Length" in late else b"%x\r\n" % (len(body) + 9)
                return Malformed("never whole", path, body, raw=_head(path, late, *keys) + start + body)

    def cheap(turn: int) -> Malformed:
        path = rng.choice(list(SAMPLES))
        body = json.dumps(SAMPLES[path]).encode()
        slot = rng.choice(places)
        match turn % 12:
            case 0:
                return Malformed("truncated", path, _cut(rng, path), chunks=rng.random() < 0.2)
            case 1:
                number = rng.choice(NUMBERS)
                while slot.types & {"number", "enum"} and number in ("1e-5000", "1" * 400):  # 0, or a valid number
                    slot = rng.choice(places)
                return Malformed("number", slot.path, _put(slot.path, slot.place, number).encode())
            case 2:
                at = rng.randrange(len(body))
                return Malformed("no UTF-8", path, body[:at] + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\x80"]) + body[at:])
            case 3:
                slot = rng.choice(texts)
                half = rng.choice(['"\\ud800"', '"a\\udfffb"', '"\\udc00\\ud800"'])
                return Malformed("surrogate", slot.path, _put(slot.path, slot.place, half).encode())
            case 4 | 5 | 6:
                slot, value = next(wrong)
                return Malformed("type", slot.path, _put(slot.path, slot.place, json.dumps(value)).encode(), chunks=rng.random() < 0.1)
            case 7:
                inner = [slot.place[:-1] for slot in places if slot.path == path and isinstance(slot.place[-1], str)]
                place = rng.choice([one for one in inner if one not in free])
                return Malformed("unknown", path, _put(path, (*place, "surprise"), "1").encode())
            case 8:
                name = next(iter(SAMPLES[path]))
                twice = body[:-1] + b', "' + name.encode() + b'": 3.5}'
                return Malformed("twice", path, rng.choice([twice, b"{" + body[1:-1] + b",}", body + body, body + b"]"]))
            case 9:
                void = rng.choice([b"", b" ", b"null", b"0", b'""', b"[]", b"{}", b"\xef\xbb\xbf", b"\x00", b"[{}]", b"tru"])
                return Malformed("empty", path, void)
            case 10:
                other = rng.choice(["text/plain", "text/xml", "multipart/form-data; boundary=x", "application/octet-stream"])
                return Malformed("content type", path, body, rng.choice([other, "application", ";"]))
            case _:
                broken = [
                    _head(path, "Transfer-Encoding: chunked", *keys) + b"zz\r\n" + body + b"\r\n0\r\n\r\n",
                    _head(path, "Transfer-Encoding: chunked", *keys) + b"5\r\n" + body + b"\r\n0\r\n\r\n",
                    _head(path, "Transfer-Encoding: gzip", *keys) + body,
                    _head(path, "Content-Length: -1", *keys) + body,
                    _head(path, "Transfer-Encoding: chunked", f"Content-Length: {len(body)}", *keys) + _chunked(body),
                    _head(path, "Content-Length: 1e3", *keys) + body,
                    _head(path, f"Content-Length: {len(body)}", "Content-Length: 3", *keys) + body,
                    _head(path, f"Content-Length: {len(body) - 3}", *keys) + body,
                    _head(path, "Transfer-Encoding: chunked", *keys) + _chunked(body[:-2]),
                    _head(path, "X: " + "y" * 100_000, *keys) + body,
                    b"\x16\x03\x01" + body,
                ]
                return Malformed("framing", path, body, raw=rng.choice(broken))

    seldom = 200
    for turn in range(count):
        yield costly(turn // seldom) if turn % seldom == seldom // 2 else cheap(turn)


@dataclass
class Client:
    """A client that keeps its connection. key: sent if it is given."""

    host: str
    port: int
    key: str = ""
    timeout: float = 60.0
    _kept: http.client.HTTPConnection | None = field(default=None, repr=False)

    def send(
        self, method: str, path: str, body: bytes = b"", content_type: str | None = "application/json", *, chunks: bool = False
    ) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if content_type is not None:
            headers["Content-Type"] = content_type
        if self._kept is not None:
            try:
                return self._ask(method, path, body, headers, chunks)
            except (OSError, http.client.HTTPException):
                self.close()  # the connection was idle for too long: try again
        self._kept = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        return self._ask(method, path, body, headers, chunks)

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str], chunks: bool) -> tuple[int, bytes]:
        assert self._kept is not None
        pieces: Any = iter([body[i : i + 65_536] for i in range(0, len(body), 65_536)]) if chunks else body
        self._kept.request(method, path, pieces, headers, encode_chunked=chunks)
        answer = self._kept.getresponse()
        found = answer.status, answer.read()
        if answer.will_close:
            self.close()
        return found

    def raw(self, data: bytes) -> tuple[int, bytes]:
        """The first answer to bytes that may not be a request."""
        with socket.create_connection((self.host, self.port), timeout=self.timeout) as one:
            with contextlib.suppress(ConnectionError):
                one.sendall(data)
            answer = http.client.HTTPResponse(one, method="POST")
            answer.begin()
            return answer.status, answer.read()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def json(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.send(method, path, b"" if body is None else json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {answer[:300]!r}")
        return json.loads(answer)

    def gauge(self, name: str) -> float:
        _, text = self.send("GET", "/metrics")
        found = re.search(rf"^redraft:{name}\{{.*\}} (\S+)$", text.decode(), re.MULTILINE)
        assert found, name
        return float(found[1])


def wrong(one: Malformed, status: int, answer: bytes, secret: str) -> str:
    """The error in an answer to a malformed body; empty if there is none."""
    text = answer.decode("utf-8", "replace")
    if not 400 <= status < 500:
        return f"{status} {text[:200]}"
    if status not in (400, 408, 413, 431):
        return f"unexpected status {status}: {text[:200]}"
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"not in the form of errors: {text[:200]!r}"
    fields = next(fields for begin, fields in ERRORS.items() if one.path.startswith(begin))
    given = frozenset() if isinstance(error, str) else frozenset(error)
    if (given != fields and not (one.raw and given == ERRORS[""])) or not (error if isinstance(error, str) else error["message"]):
        return f"not in the form of errors: {text[:200]!r}"
    if LEAKS.search(text) or (secret and secret in text):
        return f"shows internal details: {text[:400]!r}"
    return ""


def attack(
    client: Client, bodies: Iterator[Malformed], known: str, every: int, watch: Any = None
) -> tuple[Counter[str], Counter[int], list[str]]:
    """Kinds sent, statuses, and faults. watch: called with the count after each good request."""
    kinds: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    faults: list[str] = []

    def good(count: int) -> None:
        found = client.json("POST", "/v1/completions", GOOD)["choices"][0]["text"]
        if found != known:
            faults.append(f"after {count}: a good request was answered {found!r}")
        if watch is not None:
            watch(count)

    count = 0
    for count, one in enumerate(bodies, 1):
        try:
            status, answer = (
                client.raw(one.raw) if one.raw else client.send("POST", one.path, one.body, one.content_type, chunks=one.chunks)
            )
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{one.kind} {one.path} {(one.raw or one.body)[:200]!r}: no answer, {error!r}")
            client.close()
            continue
        kinds[one.kind] += 1
        statuses[status] += 1
        if problem := wrong(one, status, answer, client.key):
            faults.append(f"{one.kind} {one.path} {(one.raw or one.body)[:300]!r}: {problem}")
        if count % every == 0:
            good(count)
    good(count)
    return kinds, statuses, faults


# ---- the process


@contextlib.contextmanager
def serving(*options: str, key: str = "") -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """`redraft serve` on a free port: the process, the port and its log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = {**os.environ, **({"REDRAFT_API_KEY": key} if key else {})}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "redraft", "serve", "--port", "0", "--no-access-log", *options], cwd=ROOT, stderr=out, stdout=out,
                env=environment,
            )  # fmt: skip
        try:
            for _ in range(1200):
                if found := re.search(r"running on http://[^:]+:(\d+)", log.read_text()):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            else:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            yield process, int(found[1]), log
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            if process.poll() is None:
                process.kill()


def resident(process: subprocess.Popen[bytes]) -> float:
    """Resident memory in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def schemathesis(port: int, key: str, examples: int, seed: int) -> int:
    tool = Path(sys.executable).with_name("st")
    return subprocess.run(
        [
            str(tool), "run", f"http://127.0.0.1:{port}/openapi.json", "--exclude-checks", LEFT_OUT, "-n", str(examples), "--no-color",
            "--request-timeout", "60", "--seed", str(seed), "-H", f"Authorization: Bearer {key}", "--suppress-health-check", "all",
        ],
        cwd=tempfile.gettempdir(), check=False,
    ).returncode  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=10_000, help="number of malformed bodies")
    parser.add_argument("--examples", type=int, default=300, help="examples of schemathesis per operation and phase; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=64.0, help="MiB that the process may grow by after the first fifth")
    options = parser.parse_args()
    from redraft import LLM, SamplingParams

    known = LLM(max_model_len=128).generate(PROMPT, SamplingParams(temperature=0, max_tokens=NEW))[0].outputs[0].text
    key, faults = secrets.token_hex(16), []
    with serving("--max-model-len", "128", "--idle-timeout", "2", key=key) as (process, port, log):
        if options.examples and (code := schemathesis(port, key, options.examples, options.seed)):
            faults.append(f"schemathesis: exit code {code}")
        client = Client("127.0.0.1", port, key)
        status, _ = Client("127.0.0.1", port, "wrong").send("POST", "/v1/completions", json.dumps(GOOD).encode())
        faults += [] if status == 401 else [f"a wrong key: {status}"]
        document = client.json("GET", "/openapi.json")
        sizes = {0: resident(process)}

        def watch(count: int) -> None:
            sizes[count] = resident(process)
            if count % max(1, options.bodies // 10) == 0:
                print(f"{count:>7,} bodies, {sizes[count]:.0f} MiB", flush=True)

        print(f"{len(slots(document))} fields; {sizes[0]:.0f} MiB before", flush=True)
        began = time.perf_counter()
        kinds, statuses, found = attack(client, malformed(document, options.bodies, options.seed, key=key), known, 100, watch)
        faults += found
        running, usage = client.gauge("num_requests_running"), client.gauge("kv_cache_usage_perc")
        early, late = max(size for count, size in sizes.items() if count <= options.bodies // 5), sizes[max(sizes)]
        print(f"{sum(kinds.values()):,} bodies in {time.perf_counter() - began:.0f} s: {dict(kinds.most_common())}")
        print(f"statuses: {dict(sorted(statuses.items()))}; {running:.0f} requests run, {usage:.0%} of the cache is held")
        print(f"resident memory: {sizes[0]:.0f} MiB before, {early:.0f} after the first fifth, {late:.0f} at the end")
        if running or usage:
            faults.append("something is still held")
        if late - early > options.growth:
            faults.append(f"the process grew by {late - early:.0f} MiB")
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            faults.append(f"exit code {code}")
        logged = log.read_text()
        if "Traceback" in logged or "ERROR" in logged:
            faults.append(f"the log has errors:\n{logged[-3000:]}")
    print(f"{len(faults)} faults")
    for fault in faults[:20]:
        print(f"  {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
