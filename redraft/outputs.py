"""What `LLM` returns: one object for each prompt, each text and each piece of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from redraft.core.distribution import TopLogprobs
from redraft.core.sequence import Request
from redraft.engine.output import Provenance, Stats


@dataclass
class CompletionOutput:
    """One text. drafted[i]: token i was an accepted draft; stats: steps, drafted, accepted, mean_acceptance_length; provenance: the
    origin of each token, if requested."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] | None = None
    finish_reason: str | None = None
    drafted: list[bool] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    provenance: list[Provenance] = field(default_factory=list)


@dataclass(frozen=True)
class CacheMiss:
    """Why no more of a prompt came from the prefix cache: the prompt's token `at` differs from the cached one.

    text, cached_text: the two tokens as text; lost: further tokens that the cache would have given without this difference.
    """

    at: int
    token: int
    text: str
    cached_token: int
    cached_text: str
    lost: int

    def __str__(self) -> str:
        return f"token {self.at} is {self.text!r}, in the cache {self.cached_text!r}: up to {self.lost} more tokens would have been reused"


@dataclass
class RequestOutput:
    """One prompt and its n texts. If a prompt of a list was refused, or the model's output for it is not a number, `error` says so and
    `outputs` is empty.

    cached_tokens: prompt tokens found in the prefix cache; disk_tokens, disk_seconds: those of them that were on disk, and the time to
    read them; cache_miss: the difference that ended the match, None without one
    (requests with a codec, per-head eviction or a read with data of its own do not use the prefix cache); reused_tokens: tokens
    that were taken from the cache of another text: of the text before an edit, or of chunks; repaired_tokens: those of them and
    between them that ran again through all layers; repair_rows: all that ran again, in whole rows; before: the tokens of the text
    before an edit; guarantee: the weakest guarantee of the engine's methods and the request's; seed: the seed in use, also if none was
    given.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] | None = None
    cached_tokens: int = 0
    disk_tokens: int = 0
    disk_seconds: float = 0.0
    reused_tokens: int = 0
    repaired_tokens: int = 0
    repair_rows: float = 0.0
    cache_miss: CacheMiss | None = None
    guarantee: str = ""
    before: list[int] = field(default_factory=list)
    request: Request | None = field(default=None, repr=False)
    seed: int | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(output.finish_reason for output in self.outputs)


@dataclass(frozen=True)
class Delta:
    """A piece of a stream. prompt: the prompt's index in the list; index: the text's index among the prompt's n texts; provenance: as in
    CompletionOutput."""

    prompt: int
    index: int
    text: str
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    finish_reason: str | None
    stats: Stats
    error: str | None = None
    provenance: list[Provenance] = field(default_factory=list)
