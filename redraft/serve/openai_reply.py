"""Completions and chats in the form of OpenAI's interface."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

from redraft import __version__
from redraft.core.distribution import TopLogprobs
from redraft.core.sequence import Request
from redraft.serve.errors import Refused
from redraft.serve.parsers.parser import CallPart
from redraft.serve.reply import Choice, Writer, event, finite

FINGERPRINT = f"redraft-{__version__}"
DONE = b"data: [DONE]\n\n"


@dataclass
class Place:
    """Where the next token begins in a text, in characters. A character of several tokens counts after the last one."""

    at: int
    decoder: codecs.IncrementalDecoder = field(default_factory=partial(codecs.getincrementaldecoder("utf-8"), "replace"))

    def step(self, raw: bytes) -> int:
        begin = self.at
        self.at += len(self.decoder.decode(raw))
        return begin


class OpenAIWriter(Writer):
    """What completions and chats have in common. KIND, CHUNK: the `object` of a whole reply and of a piece of a stream."""

    KIND: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._begun: set[int] = set()

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(choice) | self.extra(choice) for choice in self.choices]
        return self._frame(self.KIND) | {"choices": choices, "usage": self.usage(), "metrics": self.metrics()}

    def chunk(self, new: Choice) -> bytes:
        first = new.index not in self._begun
        ids = self.wanted.token_ids and new.tokens
        if not (first or self._says(new) or new.reason or (self.wanted.logprobs is not None and new.logprobs) or new.provenance or ids):
            return b""
        self._begun.add(new.index)
        reply = self._frame(self.CHUNK)
        found = self._piece(new, first) | self.extra(new)
        if first and self.wanted.token_ids:
            found["prompt_token_ids"] = self._request(new).prompt
        reply["choices"] = [found]
        if self.wanted.usage:
            reply["usage"] = None
        elif self.ended:
            reply["metrics"] = self.metrics()
        return event(reply)

    def finish(self) -> bytes:
        """The usage if it is wanted, and the mark of the end."""
        if not self.wanted.usage:
            return DONE
        return event(self._frame(self.CHUNK) | {"choices": [], "usage": self.usage(), "metrics": self.metrics()}) + DONE

    def failed(self, error: Refused) -> bytes:
        return event(error.body) + DONE

    def _says(self, new: Choice) -> bool:
        return bool(new.text)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        """A text of a whole reply."""
        raise NotImplementedError

    def _piece(self, new: Choice, first: bool) -> dict[str, Any]:
        """A part of a text in a stream."""
        raise NotImplementedError

    def _frame(self, kind: str) -> dict[str, Any]:
        wanted = self.wanted
        return {"id": wanted.id, "object": kind, "created": wanted.created, "model": wanted.model, "system_fingerprint": FINGERPRINT}

    def _request(self, choice: Choice) -> Request:
        return self.submissions[choice.index // self.n].request

    def _prompt_logprobs(self, request: Request) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for one in request.prompt_logprobs:
            if one is None:
                found.append(None)
                continue
            ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top[: self.wanted.prompt_logprobs], 1)]
            if one.token not in [token for token, _, _ in ranked]:
                ranked.append((one.token, one.logprob, one.rank))
            found.append({str(t): {"logprob": finite(p), "rank": rank, "decoded_token": self.text_of(t)} for t, p, rank in ranked})
        return found


class CompletionWriter(OpenAIWriter):
    KIND = CHUNK = "text_completion"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._places = [Place(len(prompt) if self.wanted.echo else 0) for prompt in self.prompts for _ in range(self.n)]

    def _choice(self, choice: Choice) -> dict[str, Any]:
        found = self._piece(choice, first=True)
        if self.wanted.token_ids:
            found["prompt_token_ids"] = self._request(choice).prompt
        if self.wanted.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._prompt_logprobs(self._request(choice))
        return found

    def _piece(self, new: Choice, first: bool) -> dict[str, Any]:
        echo = first and self.wanted.echo
        text = (self.prompts[new.index // self.n] if echo else "") + new.text
        logprobs = self._completion_logprobs(new, echo=echo)
        return {"index": new.index, "finish_reason": new.reason, "text": text, "logprobs": logprobs}

    def _completion_logprobs(self, new: Choice, *, echo: bool) -> dict[str, Any] | None:
        if self.wanted.logprobs is None:
            return None
        number = new.index // self.n
        request = self.submissions[number].request
        entries: list[TopLogprobs | None] = [*new.logprobs]
        tokens = [one.token for one in new.logprobs]
        place, silent = self._places[new.index], self._special if request.params.skip_special_tokens else frozenset()
        offsets = [place.step(b"" if token in silent else self.tokenizer.bytes_of(token)) for token in tokens]
        if echo:
            entries, tokens = [*request.prompt_logprobs, *entries], [*request.prompt, *tokens]
            offsets = [*self._prompt_offsets(request.prompt, self.prompts[number]), *offsets]
        logprobs = [None if one is None else finite(one.logprob) for one in entries]
        top = [None if one is None else self._top(one) for one in entries]
        return {"tokens": [*map(self.text_of, tokens)], "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _prompt_offsets(self, tokens: list[int], text: str) -> list[int]:
        """The place of each token of a prompt in its text, which may lack special tokens and the space that some tokenizers add."""
        place, offsets = Place(0), []
        for token in tokens:
            raw = self.tokenizer.bytes_of(token)
            if not text.startswith(raw.decode("utf-8", "ignore"), place.at):
                raw = b"" if token in self._special else raw.removeprefix(b" ")
            offsets.append(place.step(raw))
        return offsets

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.special_ids)

    def _top(self, one: TopLogprobs) -> dict[str, float]:
        """The likeliest tokens and the chosen one. Of tokens with the same text, only the likeliest."""
        top = dict(one.top[: self.wanted.logprobs]) | {one.token: one.logprob}
        ranked = sorted(top.items(), key=lambda pair: pair[1])
        return dict(reversed({self.text_of(token): finite(logprob) for token, logprob in ranked}.items()))


class ChatWriter(OpenAIWriter):
    KIND, CHUNK = "chat.completion", "chat.completion.chunk"

    def whole(self) -> dict[str, Any]:
        reply, request = super().whole(), self.submissions[0].request
        if self.wanted.prompt_logprobs is not None:
            reply["prompt_logprobs"] = self._prompt_logprobs(request)
        if self.wanted.token_ids:
            reply["prompt_token_ids"] = request.prompt
        return reply

    def _says(self, new: Choice) -> bool:
        return bool(new.said)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        said = choice.said
        message: dict[str, Any] = {"role": self.wanted.role, "content": said.content or (None if said.calls else ""), "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(part) for part in said.calls]
        reason = ended(choice.reason, bool(said.calls))
        return {"index": choice.index, "finish_reason": reason, "message": message, "logprobs": self._chat_logprobs(choice)}

    def _piece(self, new: Choice, first: bool) -> dict[str, Any]:
        said = new.said
        delta: dict[str, Any] = {"role": self.wanted.role} if first else {}
        if said.content or not (said.reasoning or said.calls):
            delta["content"] = said.content
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.calls:
            delta["tool_calls"] = [{"index": part.index} | _call(part, whole=False) for part in said.calls]
        reason = ended(new.reason, bool(self.choices[new.index].said.calls))
        return {"index": new.index, "finish_reason": reason, "delta": delta, "logprobs": self._chat_logprobs(new)}

    def _chat_logprobs(self, new: Choice) -> dict[str, Any] | None:
        return None if self.wanted.logprobs is None else {"content": self.token_logprobs(new), "refusal": None}


def ended(reason: str | None, calls: bool) -> str | None:
    """OpenAI's name for the end of a text that may call tools."""
    return "tool_calls" if calls and reason == "stop" else reason


def _call(part: CallPart, *, whole: bool = True) -> dict[str, Any]:
    """A tool call, or a part of it."""
    function = ({"name": part.name} if whole or part.name else {}) | {"arguments": part.arguments}
    return ({"id": part.id, "type": "function"} if whole or part.id else {}) | {"function": function}
