"""A fake server of the OpenAI protocol. The object "fake" in a request's body sets its behaviour:

pieces: texts of the chunks; usage: false for none; tokens: the count in the usage, else one for each word; metrics: sent with the usage;
role: false for no chunk that only names the role; status, retry: a refusal; error: an event in the stream; cut: the connection is
closed after this many chunks; ended: false if the stream stops without a reason; hang: sends nothing until the client leaves;
gate: pieces after the first wait until the test opens it; bytes: each is a separate write; tail: written at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from typing import Any, Self

from aiohttp import web


class FakeOpenAI:
    """Runs in its own thread. tokenizer: words, letters, joined (words, fewer if different ones meet), none. `bodies`: of requests, in the
    order of arrival; `most`: the most requests that were in flight at once."""

    def __init__(self, tokenizer: str = "words", **defaults: Any) -> None:
        self.tokenizer, self.defaults = tokenizer, defaults
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.tokenized = self.active = self.most = self.left = 0
        self.url = ""
        self.gate = threading.Event()

    def __enter__(self) -> Self:
        up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(up)), daemon=True)
        self._thread.start()
        assert up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _serve(self, up: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._reply),
                web.post("/v1/chat/completions", self._reply),
                web.post("/tokenize", self._tokenize),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        up.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-1"}, {"id": "fake-2"}]})

    def count(self, body: dict[str, Any]) -> int:
        """One token before the text, and three of the template in a chat."""
        chat = "messages" in body
        text = "".join(message["content"] for message in body["messages"]) if chat else body["prompt"]
        words = text.split()
        joined = sum(a != b for a, b in itertools.pairwise(words)) // 2 if self.tokenizer == "joined" else 0
        tokens = len(text) if self.tokenizer == "letters" else len(words) - joined
        return tokens + 3 * chat + (body.get("add_special_tokens") is not False)

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.tokenizer == "none":
            return web.json_response({"detail": "Not Found"}, status=404)
        self.tokenized += 1
        return web.json_response({"count": self.count(await request.json()), "max_model_len": 4096})

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            return await self._stream(request, body, self.defaults | body.get("fake", {}))
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.active -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], how: dict[str, Any]) -> web.StreamResponse:
        if "status" in how:
            return web.json_response({"error": {"message": how.get("words", "not now"), "code": how["status"]}}, status=how["status"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def event(data: Any) -> None:
            text = f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()
            for i in range(0, len(text), 1 if how.get("bytes") else len(text)):
                await response.write(text[i : i + (1 if how.get("bytes") else len(text))])

        def choice(text: str | None, reason: str | None = None) -> dict[str, Any]:
            said = {"delta": {} if text is None else {"content": text}} if "messages" in body else {"text": text or ""}
            return {"choices": [{"index": 0, **said, "finish_reason": reason}], "usage": None}

        if "messages" in body and how.get("role", True):
            await event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        if how.get("hang"):
            await asyncio.sleep(600)
        await response.write(b": still here\n\n")
        pieces = how.get("pieces") or [" word"] * body.get("max_tokens", 4)
        for i, piece in enumerate(pieces):
            if i == how.get("cut"):
                assert request.transport is not None
                request.transport.close()
                raise ConnectionError
            while i and how.get("gate") and not self.gate.is_set():
                await asyncio.sleep(0.01)
            await event(choice(piece))
        if "error" in how:
            await event({"error": {"message": how["error"], "type": "server_error"}})
            return response
        if how.get("ended", True):
            await event(choice(None, "length"))
            if how.get("usage", True):
                written = how.get("tokens", sum(len(piece.split()) for piece in pieces))
                usage = {"prompt_tokens": self.count(body), "completion_tokens": written}
                await event({"choices": [], "usage": usage} | ({"metrics": how["metrics"]} if "metrics" in how else {}))
            await event("[DONE]")
        await response.write(how.get("tail", "").encode())
        return response
