"""Replies in the form of Ollama: one JSON object, or a stream with one on each line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, ClassVar

from redraft.serve.errors import Refused, clean
from redraft.serve.parsers.parser import CallPart, Said
from redraft.serve.reply import Choice, Writer

MEDIA_TYPE = "application/x-ndjson"


def moment(seconds: float | None = None) -> str:
    """A time of time.time, by default now, as RFC 3339 writes it."""
    at = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


class OllamaWriter(Writer):
    """model: the name by which the request called it."""

    media_type: ClassVar[str] = MEDIA_TYPE
    alive: ClassVar[bytes] = b""  # clients read every line as JSON

    def __init__(self, model: str, *given: Any) -> None:
        super().__init__(*given)
        self.model = model
        self._sent = 0  # tool calls of the stream

    def whole(self) -> dict[str, Any]:
        (choice,) = self.choices
        return self._frame(done=True) | self._says(choice.said) | self._logprobs(choice) | self._end(choice)

    def chunk(self, new: Choice) -> bytes:
        said = Said(new.said.content, new.said.reasoning, self._complete(bool(new.reason)))
        sent = b""
        if said or (new.logprobs and self.wanted.logprobs is not None):
            sent = line(self._frame(done=False) | self._says(said) | self._logprobs(new))
        if new.reason is not None:
            sent += line(self._frame(done=True) | self._says(Said()) | self._end(new))
        return sent

    def finish(self) -> bytes:
        return b""

    def failed(self, error: Refused) -> bytes:
        return line({"error": clean(error.message)})

    def _says(self, said: Said) -> dict[str, Any]:
        raise NotImplementedError

    def _frame(self, *, done: bool) -> dict[str, Any]:
        return {"model": self.model, "created_at": moment(), "done": done}

    def _logprobs(self, new: Choice) -> dict[str, Any]:
        return {} if self.wanted.logprobs is None else {"logprobs": self.token_logprobs(new)}

    def _complete(self, ended: bool) -> list[CallPart]:
        """Tool calls that are whole since the last piece: a call is, once another begins or the text has ended."""
        calls = self.choices[0].said.calls
        whole = calls[self._sent : len(calls) if ended else max(self._sent, len(calls) - 1)]
        self._sent += len(whole)
        return whole

    def _end(self, choice: Choice) -> dict[str, Any]:
        usage, (total, prompt, text) = self.usage(), (round(seconds * 1e9) for seconds in self.durations())
        return {
            "done_reason": choice.reason,
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": prompt,
            "eval_count": usage["completion_tokens"],
            "eval_duration": text,
        }


class TextWriter(OllamaWriter):
    def _says(self, said: Said) -> dict[str, Any]:
        return {"response": said.content + "".join(part.arguments for part in said.calls)} | _thinking(said)


class ChatWriter(OllamaWriter):
    def _says(self, said: Said) -> dict[str, Any]:
        calls, rest = [], ""
        for part in said.calls:
            arguments = _object(part.arguments)
            if arguments is None:  # the text ended within the call
                rest += part.arguments
            else:
                calls.append({"id": part.id, "function": {"index": part.index, "name": part.name, "arguments": arguments}})
        message = {"role": self.wanted.role, "content": said.content + rest} | _thinking(said)
        return {"message": message | ({"tool_calls": calls} if calls else {})}


def _thinking(said: Said) -> dict[str, str]:
    return {"thinking": said.reasoning} if said.reasoning else {}


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
