"""Replies in the forms of OpenAI's interface, from the engine's events."""

from __future__ import annotations

import codecs
import math
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from redraft import __version__
from redraft.core.distribution import TopLogprobs
from redraft.core.sequence import Request
from redraft.engine.output import Event, Provenance, Stats
from redraft.models.tokenizer import Tokenizer
from redraft.serve.shell import Submission

FINGERPRINT = f"redraft-{__version__}"
ALTERNATIVES = 4  # for each token, where provenance is requested


@dataclass(frozen=True)
class Wanted:
    """The contents and form of a reply."""

    id: str
    model: str
    chat: bool
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


@dataclass
class Choice:
    """One text, or what an event adds to it."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    reason: str | None = None
    stats: Stats = field(default_factory=Stats)

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.provenance += event.provenance
        self.reason = None if event.reason is None else str(event.reason)
        self.stats = event.stats


@dataclass
class Place:
    """Where the next token begins in a text, in characters. A character of several tokens counts after the last one."""

    at: int
    decoder: codecs.IncrementalDecoder = field(default_factory=partial(codecs.getincrementaldecoder("utf-8"), "replace"))

    def step(self, raw: bytes) -> int:
        begin = self.at
        self.at += len(self.decoder.decode(raw))
        return begin


class Writer:
    """The reply to one HTTP request with the prompts `submissions`. Choice i * n + j is text j of prompt i."""

    def __init__(self, wanted: Wanted, tokenizer: Tokenizer, submissions: list[Submission], prompts: list[str]) -> None:
        self.wanted, self.tokenizer, self.submissions, self.prompts = wanted, tokenizer, submissions, prompts
        self.n = submissions[0].request.params.n
        self.choices = [Choice(i) for i in range(len(submissions) * self.n)]
        self._places = [Place(len(prompt) if wanted.echo else 0) for prompt in prompts for _ in range(self.n)]
        self._begun: set[int] = set()

    def add(self, place: int, event: Event) -> Choice:
        """Adds an event of the request at this place. Returns the new part of its text."""
        index = place * self.n + event.index
        if self.wanted.drop:
            new = Choice(index, reason="length" if event.reason else None, stats=event.stats)
        else:
            new = Choice(index)
            new.add(event)
        whole = self.choices[index]
        whole.text += new.text
        whole.tokens += new.tokens
        whole.logprobs += new.logprobs
        whole.provenance += new.provenance
        whole.reason, whole.stats = new.reason, new.stats
        return new

    # ---- whole replies

    def whole(self) -> dict[str, Any]:
        reply = self._frame("chat.completion" if self.wanted.chat else "text_completion")
        reply["choices"] = [self._choice(choice) for choice in self.choices]
        reply |= {"usage": self.usage(), "metrics": self.metrics()}
        requests = [submission.request for submission in self.submissions]
        if self.wanted.chat:
            if self.wanted.prompt_logprobs is not None:
                reply["prompt_logprobs"] = self._prompt_logprobs(requests[0])
            if self.wanted.token_ids:
                reply["prompt_token_ids"] = requests[0].prompt
        return reply

    def _choice(self, choice: Choice) -> dict[str, Any]:
        request = self.submissions[choice.index // self.n].request
        found: dict[str, Any] = {"index": choice.index, "finish_reason": choice.reason}
        if self.wanted.chat:
            found["message"] = {"role": self.wanted.role, "content": choice.text, "refusal": None}
            found["logprobs"] = self._chat_logprobs(choice)
        else:
            prompt = self.prompts[choice.index // self.n] if self.wanted.echo else ""
            found |= {"text": prompt + choice.text, "logprobs": self._completion_logprobs(choice, echo=self.wanted.echo)}
            if self.wanted.token_ids:
                found["prompt_token_ids"] = request.prompt
            if self.wanted.prompt_logprobs is not None:
                found["prompt_logprobs"] = self._prompt_logprobs(request)
        return found | self._extra(choice)

    # ---- streams

    def chunk(self, new: Choice) -> dict[str, Any] | None:
        """One piece, None if nothing can be sent yet."""
        first = new.index not in self._begun
        place = new.index // self.n
        ids = self.wanted.token_ids and new.tokens
        if not (first or new.text or new.reason or (self.wanted.logprobs is not None and new.logprobs) or new.provenance or ids):
            return None
        self._begun.add(new.index)
        reply = self._frame("chat.completion.chunk" if self.wanted.chat else "text_completion")
        found: dict[str, Any] = {"index": new.index, "finish_reason": new.reason}
        if self.wanted.chat:
            delta = {"role": self.wanted.role} if first else {}
            found |= {"delta": delta | {"content": new.text}, "logprobs": self._chat_logprobs(new)}
        else:
            echo = first and self.wanted.echo
            found |= {
                "text": (self.prompts[place] if echo else "") + new.text,
                "logprobs": self._completion_logprobs(new, echo=echo),
            }
        if first and self.wanted.token_ids:
            found["prompt_token_ids"] = self.submissions[place].request.prompt
        reply["choices"] = [found | self._extra(new)]
        if self.wanted.usage:
            reply["usage"] = None
        elif all(choice.reason for choice in self.choices):
            reply["metrics"] = self.metrics()
        return reply

    def last(self) -> dict[str, Any]:
        """The chunk of the usage."""
        reply = self._frame("chat.completion.chunk" if self.wanted.chat else "text_completion")
        return reply | {"choices": [], "usage": self.usage(), "metrics": self.metrics()}

    # ---- parts

    def _frame(self, kind: str) -> dict[str, Any]:
        wanted = self.wanted
        return {"id": wanted.id, "object": kind, "created": wanted.created, "model": wanted.model, "system_fingerprint": FINGERPRINT}

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(submission.request.prompt) for submission in self.submissions)
        completion = sum(len(choice.tokens) for choice in self.choices)
        found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        found["prompt_tokens_details"] = {"cached_tokens": sum(submission.request.cached_tokens or 0 for submission in self.submissions)}
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
            "seeds": [submission.request.params.seed for submission in self.submissions],
        }  # fmt: skip

    def _extra(self, new: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.wanted.token_ids:
            found["token_ids"] = new.tokens
        if self.wanted.provenance:
            found["provenance"] = [
                self._origin(token, one, of) for token, one, of in zip(new.tokens, new.logprobs, new.provenance, strict=True)
            ]
            found["trees"] = [self._tree(one) for one in new.provenance if one.tree is not None]
        return found

    def _origin(self, token: int, one: TopLogprobs, of: Provenance) -> dict[str, Any]:
        beside = [(other, logprob) for other, logprob in one.top if other != token][:ALTERNATIVES]
        return {
            "token": self._text(token),
            "token_id": token,
            "step": of.step,
            "origin": of.drafter or "model",
            "probability": math.exp(one.logprob),
            "rank": one.rank,
            "alternatives": [
                {"token": self._text(other), "token_id": other, "probability": math.exp(logprob)} for other, logprob in beside
            ],
        }

    def _tree(self, of: Provenance) -> dict[str, Any]:
        assert of.tree is not None
        tree = of.tree
        origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
        nodes = zip(tree.tokens.tolist(), tree.parents.tolist(), origins, strict=True)
        shown = [
            {"token": self._text(token), "token_id": token, "parent": parent, "origin": of.names[origin], "accepted": i in of.path}
            for i, (token, parent, origin) in enumerate(nodes)
        ]
        return {"step": of.step, "nodes": shown}

    def _chat_logprobs(self, new: Choice) -> dict[str, Any] | None:
        if self.wanted.logprobs is None:
            return None
        content = []
        for one in new.logprobs:
            top = [self._entry(token, logprob) for token, logprob in one.top[: self.wanted.logprobs]]
            content.append(self._entry(one.token, one.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

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
        logprobs = [None if one is None else _finite(one.logprob) for one in entries]
        top = [None if one is None else self._top(one) for one in entries]
        return {"tokens": [*map(self._text, tokens)], "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

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
        return dict(reversed({self._text(token): _finite(logprob) for token, logprob in ranked}.items()))

    def _prompt_logprobs(self, request: Request) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for one in request.prompt_logprobs:
            if one is None:
                found.append(None)
                continue
            ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top[: self.wanted.prompt_logprobs], 1)]
            if one.token not in [token for token, _, _ in ranked]:
                ranked.append((one.token, one.logprob, one.rank))
            found.append({str(t): {"logprob": _finite(p), "rank": rank, "decoded_token": self._text(t)} for t, p, rank in ranked})
        return found

    def _text(self, token: int) -> str:
        return self.tokenizer.bytes_of(token).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
