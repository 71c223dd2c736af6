"""One request to an OpenAI-compatible server, from its body to the record of its stream."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from redraft.bench.load import workload
from redraft.bench.load.figures import Record
from redraft.bench.load.workload import Ask, Words
from redraft.errors import InvalidInput, RedraftError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
BUSY = 8  # requests at once that are not measured
KEPT = 2.0  # seconds that an idle connection may be reused; less than servers keep theirs, else a request may meet a closed one
SHOWN = 200  # characters of an error


@dataclass(frozen=True)
class Target:
    """The server, and what all requests to it have in common. extra: further fields of the body, which override others. ignore_eos:
    generate until max_tokens; most servers know this field, but OpenAI's own does not."""

    base_url: str
    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    temperature: float | None = None
    seed: int = 0
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InvalidInput(f"base-url = {self.base_url}: http://HOST:PORT or https://HOST is needed")
        if self.endpoint not in PATHS:
            raise InvalidInput(f"endpoint = {self.endpoint}: {' or '.join(PATHS)} is needed")
        if not self.timeout > 0:
            raise InvalidInput(f"timeout = {self.timeout:g}: seconds above 0 are needed")

    @property
    def root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")

    def check(self, asks: list[Ask]) -> None:
        if self.endpoint == "completions" and any(ask.messages is not None for ask in asks):
            raise InvalidInput("prompts: messages are for --endpoint chat")

    def body(self, model: str, ask: Ask, words: Words) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        text = words.prompt(ask, self.seed) if ask.input_len is not None else ask.prompt or ""
        fields |= self.asking(text) if ask.messages is None else {"messages": ask.messages}
        fields |= {"max_tokens": ask.output_len, "seed": self.seed + ask.index}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        return fields | self.extra

    def asking(self, text: str) -> dict[str, Any]:
        return {"prompt": text} if self.endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}


class Refused(Exception):
    """A failed request: its kind, and the server's text."""


class Events:
    """Server-sent events from pieces of bytes, which may be cut anywhere, even within a character."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that ends within the piece. Comments and other fields are ignored."""
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []

    def end(self) -> Iterator[bytes]:
        """The last event, if it lacks its empty line."""
        yield from self.feed(b"\n\n")


def take(record: Record, data: bytes, at: float) -> bool:
    """Records one event. Returns whether the text ends with it. Raises Refused if the event is an error or malformed."""
    if data == b"[DONE]":
        return True
    try:
        return _take(record, json.loads(data), at)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise Refused("bad stream", f"makes no sense: {said(data.decode(errors='replace'))}") from None


def _take(record: Record, event: Any, at: float) -> bool:
    if event.get("error"):
        raise Refused("error event", said(event))
    if usage := event.get("usage"):
        record.input_tokens = int(usage.get("prompt_tokens") or 0)
        if usage.get("completion_tokens") is not None:
            record.output_tokens, record.counted = int(usage["completion_tokens"]), "usage"
    if isinstance(metrics := event.get("metrics"), dict):
        record.metrics = metrics
    if not (choices := event.get("choices")):
        return False
    choice = choices[0]
    delta = choice.get("delta") or choice
    text = "".join(delta.get(name) or "" for name in ("text", "content", "reasoning_content", "reasoning"))
    finished = choice.get("finish_reason") is not None
    # A token may have no text yet, if it is part of a character. A role or a finish reason is not a token.
    if text or delta.get("tool_calls") or not (finished or "role" in delta):
        record.chunks.append(at)
    if text or finished or "role" not in delta:
        record.ended = at
    record.text += text
    return finished


def said(reply: Any) -> str:
    """The message of an error reply, in OpenAI's form or another."""
    for name in ("error", "message", "detail"):
        if isinstance(reply, dict) and reply.get(name):
            reply = reply[name]
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return "".join(letter if letter.isprintable() else " " for letter in text)[:SHOWN].strip()


class Client:
    """Requests to one server. `zero`: times count from this moment."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self.target = target
        self.zero = time.perf_counter()
        self._session = session
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {target.api_key}"} if target.api_key else {})

    @classmethod
    def session(cls, target: Target) -> aiohttp.ClientSession:
        """Opens a session without a limit of connections, because the load decides how many there are."""
        timeout = aiohttp.ClientTimeout(total=target.timeout)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT), timeout=timeout)

    def restart(self) -> None:
        self.zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.zero

    async def send(self, body: bytes, record: Record) -> None:
        """Fills the record. An error becomes its failure."""
        record.sent = self.now()
        begun = False
        try:
            async with self._session.post(self.target.root + PATHS[self.target.endpoint], data=body, headers=self._headers) as response:
                if response.status != 200:
                    raise Refused(f"HTTP {response.status}", await _words(response))
                begun, events, finished = True, Events(), False
                async for piece in response.content.iter_any():
                    at = self.now()
                    for event in events.feed(piece):
                        finished |= take(record, event, at)
                for event in events.end():
                    finished |= take(record, event, self.now())
                if not finished:
                    raise Refused("cut short", "the stream ended before the text did")
            if math.isnan(record.ended):
                raise Refused("no token", "the stream said nothing of a text")
            if not record.chunks:
                record.chunks.append(record.ended)  # a text that ends without a token
            record.done = True
        except Refused as refused:
            kind, words = refused.args
            record.failure = kind, words
        except TimeoutError:
            record.failure = "timeout", f"no end within {self.target.timeout:g} s"
        except (aiohttp.ClientError, OSError) as error:
            record.failure = "cut short" if begun else "connection", said(str(error) or type(error).__name__)

    # ---- requests outside the measurement

    async def model(self) -> str:
        """The model to request: the first name in the server's /v1/models."""
        if self.target.model is not None:
            return self.target.model
        reply = await self._json("GET", "/v1/models", None)
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RedraftError(f"{self.target.root}/v1/models names no model; --model does") from None

    async def count(self, fields: dict[str, Any]) -> int:
        """Tokens of a prompt or of messages, as the server would read them."""
        if "messages" in fields:
            fields = {**fields, "add_generation_prompt": True}
        reply = await self._json("POST", "/tokenize", fields)
        found = reply.get("count") if isinstance(reply, dict) else None
        if not isinstance(found, int):
            raise RedraftError(f"{self.target.root}/tokenize: returned no token count")
        return found

    async def words(self, model: str) -> Words:
        """Words of one token each, found with the server's own tokenizer. Inexact words if it has no /tokenize or no such words."""
        busy = asyncio.Semaphore(BUSY)

        async def tokens(text: str) -> int:
            async with busy:
                return await self.count({"model": model, **self.target.asking(workload.STEM + text)})

        try:
            overhead = await tokens("")
            for units in (workload.WORDS, workload.LETTERS):
                counts = await asyncio.gather(*(tokens(unit * workload.REPEATS) for unit in units), return_exceptions=True)
                single = tuple(unit for unit, found in zip(units, counts) if found == overhead + workload.REPEATS)
                words = Words(single, overhead, exact=True)
                if len(single) >= workload.ENOUGH:
                    mixed = words.text("mixed", workload.MIXED)
                    if await tokens(mixed) == overhead + workload.MIXED:
                        return words
        except RedraftError:
            pass
        return Words()

    async def recount(self, model: str, records: list[Record], tokenizer: bool) -> None:
        """Output tokens, if the server sends no usage: counted by its tokenizer; if that fails or is not allowed, one for each chunk."""
        for record in records:
            if record.done and not record.counted:
                record.output_tokens, record.counted = len(record.chunks), "chunks"
                if tokenizer:
                    try:
                        fields = {"model": model, "prompt": record.text, "add_special_tokens": False}
                        record.output_tokens, record.counted = await self.count(fields), "tokenize"
                    except RedraftError:
                        tokenizer = False

    async def _json(self, method: str, path: str, fields: Any) -> Any:
        url = self.target.root + path
        try:
            async with self._session.request(method, url, json=fields, headers=self._headers) as response:
                if response.status != 200:
                    raise RedraftError(f"{url}: HTTP {response.status}: {await _words(response)}")
                return json.loads(await response.read())
        except TimeoutError:
            raise RedraftError(f"{url}: no answer within {self.target.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise RedraftError(f"{url}: {said(str(error) or type(error).__name__)}") from None
        except ValueError:
            raise RedraftError(f"{url}: the answer is not JSON") from None


async def _words(response: aiohttp.ClientResponse) -> str:
    body = await response.read()
    try:
        return said(json.loads(body))
    except ValueError:
        return said(body.decode(errors="replace")) or response.reason or ""
