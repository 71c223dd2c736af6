"""Replies in the form of the Responses API: items, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from redraft.engine.output import Event
from redraft.serve.errors import Refused
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Choice, Writer, event
from redraft.serve.responses_items import name, text_part
from redraft.serve.responses_schema import ResponseRequest


class Send(Protocol):
    def __call__(self, kind: str, **fields: Any) -> None: ...


class Items:
    """The items of a reply while they arrive. One at most is open, the last. of: what is unique to the reply; send: gets the events."""

    def __init__(self, of: str, send: Send) -> None:
        self.items: list[dict[str, Any]] = []
        self._of, self._send = of, send
        self._open: str | int | None = None  # its type, or the number of the call
        self._pieces: list[str] = []  # of its text or arguments
        self._logprobs: list[dict[str, Any]] = []  # of its text
        self._held: list[dict[str, Any]] = []  # of tokens whose text has not come yet

    def add(self, said: Said, logprobs: list[dict[str, Any]]) -> None:
        """Adds what the text has gained. logprobs: of its tokens."""
        self._held += logprobs
        parts: list[tuple[str | int, str | CallPart]] = [("reasoning", said.reasoning), ("message", said.content)]
        parts += [(part.index, part) for part in said.calls]
        for key, part in sorted(parts, key=lambda one: one[0] != self._open):  # first what continues the open item
            if part:
                self._extend(key, part)

    def end(self, status: str) -> None:
        """Ends the reply. status: of the item that is open."""
        if not self.items:
            self._begin("message", None)
        if self._open == "message" and self._held:
            self._say("")
        self.close(status)

    def _extend(self, key: str | int, part: str | CallPart) -> None:
        if key != self._open:
            self.close("completed")
            self._begin(key, part)
        if isinstance(part, CallPart):
            if part.arguments:
                self._pieces.append(part.arguments)
                self._send("response.function_call_arguments.delta", **self._place, delta=part.arguments)
        elif key == "message":
            self._say(part)
        else:
            self._pieces.append(part)
            self._send("response.reasoning_text.delta", **self._place, content_index=0, delta=part)
        if key != "message":
            self._held.clear()

    def _say(self, text: str) -> None:
        self._pieces.append(text)
        self._logprobs += self._held
        self._send("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=self._held)
        self._held.clear()

    def _begin(self, key: str | int, part: str | CallPart | None) -> None:
        kind = key if isinstance(key, str) else "function_call"
        item: dict[str, Any] = {"type": kind, "id": name(kind, f"{self._of}{len(self.items)}"), "status": "in_progress"}
        if isinstance(part, CallPart):
            item |= {"call_id": part.id, "name": part.name, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        self.items.append(item)
        self._open, self._pieces, self._logprobs = key, [], []
        self._send("response.output_item.added", output_index=self._place["output_index"], item=item)
        if kind != "function_call":
            self._send("response.content_part.added", **self._place, content_index=0, part=self._part(""))

    def close(self, status: str) -> None:
        if self._open is None:
            return
        item, text = self.items[-1], "".join(self._pieces)
        if isinstance(self._open, int):
            item["arguments"] = text
            self._send("response.function_call_arguments.done", **self._place, arguments=text)
        else:
            part = self._part(text)
            item["content"] = [part]
            more = {"logprobs": self._logprobs} if self._open == "message" else {}
            kind = "output_text" if self._open == "message" else "reasoning_text"
            self._send(f"response.{kind}.done", **self._place, content_index=0, text=text, **more)
            self._send("response.content_part.done", **self._place, content_index=0, part=part)
        item["status"] = status
        self._send("response.output_item.done", output_index=self._place["output_index"], item=item)
        self._open = None

    def _part(self, text: str) -> dict[str, Any]:
        return text_part(text, self._logprobs) if self._open == "message" else {"type": "reasoning_text", "text": text}

    @property
    def _place(self) -> dict[str, Any]:
        """Of the open item."""
        return {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}


class ResponseWriter(Writer):
    """asked: what the client sent; keep: gets the response when it has ended. The other arguments are those of Writer."""

    def __init__(self, asked: ResponseRequest, keep: Callable[[dict[str, Any]], None] | None, *given: Any) -> None:
        super().__init__(*given)
        self.asked, self._keep = asked, keep
        self._events: list[bytes] = []
        self._sent = 0
        self._items = Items(self.wanted.id.partition("_")[2], self._send)

    def add(self, place: int, event: Event) -> Choice:
        new = super().add(place, event)
        self._items.add(new.said, [] if self.wanted.logprobs is None else self.token_logprobs(new))
        if new.reason is not None:
            self._items.end("completed" if new.reason == "stop" else "incomplete")
        return new

    def whole(self) -> dict[str, Any]:
        return self._ended()

    def begin(self) -> bytes:
        self._send("response.created", response=self._frame("in_progress"))
        self._send("response.in_progress", response=self._frame("in_progress"))
        return self._take()

    def chunk(self, new: Choice) -> bytes:
        return self._take()

    def finish(self) -> bytes:
        response = self._ended()
        self._send(f"response.{response['status']}", response=response)
        return self._take()

    def failed(self, error: Refused) -> bytes:
        self._items.close("incomplete")
        failure = {"code": "server_error", "message": error.body["error"]["message"]}
        response = self._frame("failed") | {"error": failure, "output": self._items.items, "usage": self._usage()}
        self._store(response)
        self._send("response.failed", response=response)
        return self._take()

    def _send(self, kind: str, **fields: Any) -> None:
        if self.asked.stream:
            self._events.append(event({"type": kind, "sequence_number": self._sent, **fields}, kind))
            self._sent += 1

    def _take(self) -> bytes:
        taken = b"".join(self._events)
        self._events.clear()
        return taken

    def _ended(self) -> dict[str, Any]:
        (choice,) = self.choices
        whole = choice.reason == "stop"
        response = self._frame("completed" if whole else "incomplete") | {"output": self._items.items, "usage": self._usage()}
        if whole:
            response["completed_at"] = int(time.time())
        else:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response |= {"metrics": self.metrics(), **self.extra(choice)}
        self._store(response)
        return response

    def _store(self, response: dict[str, Any]) -> None:
        if self._keep is not None:
            self._keep(response)

    def _frame(self, status: str) -> dict[str, Any]:
        """A response without output."""
        asked, params = self.asked, self.submissions[0].request.params
        format, reasoning = None if asked.text is None else asked.text.format, asked.reasoning
        choice = asked.tool_choice or "auto"
        return {
            "id": self.wanted.id,
            "object": "response",
            "created_at": self.wanted.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.wanted.model,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": self._keep is not None,
            "temperature": params.temperature,
            "text": {"format": format.model_dump(by_alias=True, exclude_none=True) if format else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or []],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }

    def _usage(self) -> dict[str, Any]:
        """Of the reasoning its text is counted, without marks around it."""
        found = self.usage()
        thought = self.choices[0].said.reasoning
        thinking = min(len(self.tokenizer.encode(thought, special=False)), found["completion_tokens"]) if thought else 0
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cache_write_tokens": 0, **found["prompt_tokens_details"]},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {**found.get("completion_tokens_details", {}), "reasoning_tokens": thinking},
            "total_tokens": found["total_tokens"],
        }
