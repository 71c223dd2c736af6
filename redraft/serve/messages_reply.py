"""Replies and errors in the form of Anthropic's Messages interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from redraft.engine.output import Event
from redraft.serve import errors
from redraft.serve.errors import FORMS, Refused, clean
from redraft.serve.limits import KEY_HEADERS
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Choice, Writer, event

PATH = "/v1/messages"  # begins all paths of this interface
TYPES = errors.TYPES | {500: "api_error", 503: "overloaded_error"}
STARTS = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"), "tool_use": ("input_json_delta", "partial_json")}


def form_of(error: Refused, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error. request_id: of the reply that it ended."""
    message = clean(error.message)
    if error.param and error.param not in message:
        message = clean(f"{error.param}: {message}")
    return {"type": "error", "error": {"type": TYPES[error.status], "message": message}, "request_id": request_id}


FORMS[PATH] = form_of
KEY_HEADERS[PATH] = b"x-api-key"


@dataclass
class Block:
    """A block of content. text: of a call, the JSON text of its input; call: its number in the reply, -1 for other blocks."""

    kind: Literal["text", "thinking", "tool_use"]
    call: int = -1
    id: str = ""
    name: str = ""
    text: str = ""

    @property
    def start(self) -> dict[str, Any]:
        """The block before anything is in it."""
        return {"type": self.kind, **STARTS.get(self.kind, {"id": self.id, "name": self.name, "input": {}})}

    def whole(self, signature: str) -> dict[str, Any]:
        if self.kind == "tool_use":
            return self.start | {"input": _object(self.text)}
        return self.start | {self.kind: self.text} | ({"signature": signature} if self.kind == "thinking" else {})


class MessageWriter(Writer):
    """shows: whether blocks of thinking have their text."""

    alive = event({"type": "ping"}, "ping")
    id_header = "request-id"

    def __init__(self, *given: Any, shows: bool = True) -> None:
        super().__init__(*given)
        self._shows = shows
        self._blocks: list[Block] = []
        self._unsent: list[dict[str, Any]] = []

    def add(self, place: int, event: Event) -> Choice:
        new = super().add(place, event)
        self._unsent += self._grow(new.said)
        return new

    def whole(self) -> dict[str, Any]:
        content = [block.whole(self.wanted.id) for block in self._blocks]
        return self._message(content) | self._ended() | {"usage": self._counts(), "metrics": self.metrics()}

    def begin(self) -> bytes:
        nothing = {"stop_reason": None, "stop_sequence": None, "usage": self._counts()}
        return _events([{"type": "message_start", "message": self._message([]) | nothing}])

    def chunk(self, new: Choice) -> bytes:
        unsent, self._unsent = self._unsent, []
        return _events(unsent)

    def finish(self) -> bytes:
        last = {"type": "message_delta", "delta": self._ended(), "usage": self._counts(), "metrics": self.metrics()}
        return _events([*self._close(), last, {"type": "message_stop"}])

    def failed(self, error: Refused) -> bytes:
        return event(form_of(error, self.wanted.id), "error")

    # ---- blocks

    def _grow(self, said: Said) -> Iterator[dict[str, Any]]:
        """Adds a part of the reply to the blocks, and yields the events that tell of it."""
        if said.reasoning:
            yield from self._write(Block("thinking"), said.reasoning)
        if said.content:
            yield from self._write(Block("text"), said.content)
        for part in said.calls:
            yield from self._write(_called(part), part.arguments)

    def _write(self, begun: Block, text: str) -> Iterator[dict[str, Any]]:
        """Adds text to the last block, or to `begun` if that is another one."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or (last.kind, last.call) != (begun.kind, begun.call):
            yield from self._close()
            self._blocks.append(begun)
            yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": begun.start}
            last = begun
        if text and (self._shows or last.kind != "thinking"):
            last.text += text
            kind, name = DELTAS[last.kind]
            yield self._delta({"type": kind, name: text})

    def _close(self) -> Iterator[dict[str, Any]]:
        """The end of the last block, if there is one."""
        if self._blocks:
            if self._blocks[-1].kind == "thinking":
                yield self._delta({"type": "signature_delta", "signature": self.wanted.id})
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    # ---- parts of the message

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.wanted.id, "type": "message", "role": "assistant", "model": self.wanted.model, "content": content}

    def _ended(self) -> dict[str, Any]:
        """Why the text ended."""
        (choice,) = self.choices
        if choice.reason == "length":
            most = self.submissions[0].request.params.max_tokens
            reason = "max_tokens" if len(choice.tokens) == most else "model_context_window_exceeded"
        else:
            reason = "stop_sequence" if choice.stop is not None else "tool_use" if choice.said.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": choice.stop}

    def _counts(self) -> dict[str, int]:
        found = self.usage()
        cached = found["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": found["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": found["completion_tokens"],
        }


def _called(part: CallPart) -> Block:
    return Block("tool_use", part.index, part.id, part.name)


def _object(text: str) -> dict[str, Any]:
    """The JSON object that a text is, or the part of it that was written before the text ended."""
    try:
        found = from_json(text, allow_partial=True) if text else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _events(several: list[dict[str, Any]]) -> bytes:
    return b"".join(event(one, one["type"]) for one in several)
