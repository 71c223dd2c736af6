"""The reply to a request, collected from the engine's events. The files of the interfaces give it their forms."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, ClassVar

from redraft.core.distribution import TopLogprobs
from redraft.engine.output import Event, Provenance, Stats
from redraft.models.tokenizer import Tokenizer
from redraft.serve import provenance
from redraft.serve.choices import cache_policy
from redraft.serve.errors import Refused
from redraft.serve.parsers.chain import Unspecial
from redraft.serve.parsers.parser import Parser, Plain, Said
from redraft.serve.shell import Submission


@dataclass(frozen=True)
class Wanted:
    """The contents of a reply. parser: makes what reads the text of each choice."""

    id: str = ""
    model: str = ""
    role: str = "assistant"
    logprobs: int | None = None  # likeliest tokens at each place
    prompt_logprobs: int | None = None  # of the prompt, likewise
    token_ids: bool = False
    provenance: bool = False
    echo: bool = False
    drop: bool = False  # the reply has no generated token: the request was only about the prompt
    usage: bool = False  # in a last chunk of a stream
    created: int = field(default_factory=lambda: int(time.time()))
    predicted: str = ""  # the name of the prediction's drafter in the statistics
    parser: Callable[[], Parser] = Plain
    hidden: Mapping[int, str] | None = None  # special tokens, with their spellings, that the parser need not see


@dataclass
class Choice:
    """One text, or what an event adds to it. said: the text as its parser reads it."""

    index: int
    text: str = ""
    said: Said = field(default_factory=Said)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    reason: str | None = None
    stop: str | None = None  # the stop string that ended the text
    stats: Stats = field(default_factory=Stats)

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.provenance += event.provenance
        self.reason = None if event.reason is None else str(event.reason)
        self.stop = event.stop
        self.stats = event.stats


class Writer(ABC):
    """The reply to one HTTP request with the prompts `submissions`. Choice i * n + j is text j of prompt i. A subclass gives the reply the
    form of one interface, whole or as a stream."""

    media_type: ClassVar[str] = "text/event-stream"
    alive: ClassVar[bytes] = b": still at work\n\n"  # sent while there is nothing else to send; may be empty
    id_header: ClassVar[str] = "X-Request-Id"  # holds the reply's id

    def __init__(self, wanted: Wanted, tokenizer: Tokenizer, submissions: list[Submission], prompts: list[str]) -> None:
        self.wanted, self.tokenizer, self.submissions, self.prompts = wanted, tokenizer, submissions, prompts
        self.n = submissions[0].request.params.n
        self.choices = [Choice(i) for i in range(len(submissions) * self.n)]
        self._parsers = [wanted.parser() for _ in self.choices]
        self._unspecial = [Unspecial(wanted.hidden or {}) for _ in self.choices]

    def add(self, place: int, event: Event) -> Choice:
        """Adds an event of the request at this place. Returns the new part of its text."""
        index = place * self.n + event.index
        if self.wanted.drop:
            new = Choice(index, reason="length" if event.reason else None, stats=event.stats)
        else:
            new = Choice(index)
            new.add(event)
        parser = self._parsers[index]
        new.said = parser.feed(self._unspecial[index].feed(new.text, new.tokens, last=new.reason is not None))
        if new.reason is not None:
            new.said = new.said.followed_by(parser.end())
        whole = self.choices[index]
        whole.text += new.text
        whole.said.add(new.said)
        whole.tokens += new.tokens
        whole.logprobs += new.logprobs
        whole.provenance += new.provenance
        whole.reason, whole.stop, whole.stats = new.reason, new.stop, new.stats
        return new

    @property
    def ended(self) -> bool:
        return all(choice.reason for choice in self.choices)

    # ---- the form of the interface

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The complete reply."""

    def begin(self) -> bytes:
        """What a stream sends before anything is generated."""
        return b""

    @abstractmethod
    def chunk(self, new: Choice) -> bytes:
        """What a stream sends for a new part of a text; empty if nothing can be sent yet."""

    @abstractmethod
    def finish(self) -> bytes:
        """What a stream sends when all texts have ended."""

    @abstractmethod
    def failed(self, error: Refused) -> bytes:
        """What a stream sends, and nothing after it, if the request fails."""

    # ---- parts that forms have in common

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(submission.request.prompt) for submission in self.submissions)
        completion = sum(len(choice.tokens) for choice in self.choices)
        found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        details: dict[str, Any] = {"cached_tokens": sum(one.request.cached_tokens or 0 for one in self.submissions)}
        found["prompt_tokens_details"] = details
        if (request := self.submissions[0].request).reuse:
            details |= {"reused_tokens": request.reused_tokens, "repaired_tokens": request.repaired_tokens}
            details["repair_rows"] = round(request.repair_rows, 3)
            if request.miss is not None:
                at, token, cached, lost = request.miss
                text, other = (self.tokenizer.decode_all([one]) for one in (token, cached))
                details["cache_miss"] = {"at": at, "text": text, "cached_text": other, "lost": lost}
        if self.wanted.predicted:
            counts = [choice.stats.by_drafter.get(self.wanted.predicted, (0, 0)) for choice in self.choices]
            drafted, kept = sum(count for count, _ in counts), sum(count for _, count in counts)
            found["completion_tokens_details"] = {"accepted_prediction_tokens": kept, "rejected_prediction_tokens": drafted - kept}
        return found

    def metrics(self) -> dict[str, Any]:
        """Times of the request in seconds, and figures of its drafts."""
        stats = [choice.stats for choice in self.choices]
        steps, accepted = sum(one.steps for one in stats), sum(one.accepted for one in stats)
        deepest = max((len(one.by_depth) for one in stats), default=0)
        firsts = [submission.first - submission.arrived for submission in self.submissions if submission.first is not None]
        gaps = [gap for submission in self.submissions for gap in submission.gaps]
        more = sum(len(choice.tokens) - 1 for choice in self.choices if choice.tokens)
        queued = [one.request.admitted - one.arrived for one in self.submissions if one.request.admitted is not None]
        return {
            "time_to_first_token": _rounded(min(firsts, default=None)),
            "queue_time": _rounded(max(0.0, max(queued, default=0.0))),
            "mean_inter_token_latency": _rounded(sum(gaps) / more if more else None),
            "steps": steps,
            "drafted": sum(one.drafted for one in stats),
            "accepted": accepted,
            "mean_acceptance_length": round(1 + accepted / steps, 4) if steps else None,
            "acceptance_by_position": [
                sum(one.by_depth[depth] for one in stats if depth < len(one.by_depth)) for depth in range(deepest)
            ],
            "stopped_drafters": sorted({name for one in stats for name in one.stopped}),
            "faults": sorted({one.fault for one in stats if one.fault}),
            "disk_tokens": sum(submission.request.disk_tokens for submission in self.submissions),
            "disk_seconds": _rounded(sum(submission.request.disk_seconds for submission in self.submissions)),
            "cache_policies": [cache_policy(submission.request.params) for submission in self.submissions],
            "seeds": [submission.request.params.seed for submission in self.submissions],
        }  # fmt: skip

    def durations(self, index: int | None = None) -> tuple[float, float, float]:
        """Seconds since the request arrived, those from its start in the engine to its first token, and those from there to its last. Of
        all texts, or of the one with this index."""
        some = self.submissions if index is None else [self.submissions[index // self.n]]
        now, none = monotonic(), min(one.arrived for one in some)
        begun = min((one.request.admitted for one in some if one.request.admitted is not None), default=none)
        first = min((one.first for one in some if one.first is not None), default=begun)
        ends = [time for one in some for text, time in one.last.items() if index is None or text == index % self.n]
        return now - none, max(0.0, first - begun), max(0.0, max(ends, default=first) - first)

    def extra(self, new: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.wanted.token_ids:
            found["token_ids"] = new.tokens
        if self.wanted.provenance:
            found |= provenance.parts(self.tokenizer, new.tokens, new.logprobs, new.provenance)
        return found

    def token_logprobs(self, new: Choice) -> list[dict[str, Any]]:
        """Each token with the likeliest at its place, in the form of OpenAI's chats."""
        return [
            self._token(one.token, one.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in one.top[: self.wanted.logprobs]]}
            for one in new.logprobs
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    def text_of(self, token: int) -> str:
        return self.tokenizer.bytes_of(token).decode("utf-8", "replace")


def event(data: Any, name: str = "") -> bytes:
    """A server-sent event with JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


def finite(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
