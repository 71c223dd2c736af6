"""Requests and sequences: all that outlives a step, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from redraft.config import SamplingParams
from redraft.core.distribution import TopLogprobs
from redraft.core.tree import F64
from redraft.core.view import Window

if TYPE_CHECKING:
    from redraft.kv.eviction.eviction import OpenKeep
    from redraft.kv.reuse.reuse import OpenReuse, Span
    from redraft.kv.sparse_attention.sparse_attention import OpenRead

NEVER = 1 << 30  # tokens: more than any text has


class Lanes(StrEnum):
    """How many growing arrays of slots a sequence has in the cache."""

    SHARED = "shared"  # one for the whole model
    PER_LAYER = "per-layer"
    PER_HEAD = "per-head"  # one for each layer and kv head


class Space(NamedTuple):
    """Pages of one size: a lane kind and the name of a format, empty for keys and values as they are."""

    lanes: Lanes = Lanes.SHARED
    format: str = ""


@dataclass(frozen=True, eq=False)
class CachePlan:
    """How the cache of a text is stored, evicted from and read: what its request chose, opened, and what follows from that.

    keep: the eviction policy; read: the sparse attention; reuse: how the cache of an edited text is taken over; each None where none
    was chosen. lanes: the lanes of the sequence. format, coded: names of page formats, empty for keys and values as they are (see
    View); encoded: each time that so many more tokens are stored, full pages change from `format` to `coded`. window: what rows see,
    None for all. max_slots: committed slots of a lane, at most. shareable_tokens: leading tokens whose pages depend on these tokens
    alone, before the sequence lowers it. endless: positions may exceed the trained context, because distances within the cache never
    do. layers: those that rows after the context run, None for all.
    """

    keep: OpenKeep | None = None
    read: OpenRead | None = None
    reuse: OpenReuse | None = None
    lanes: Lanes = Lanes.SHARED
    format: str = ""
    coded: str = ""
    encoded: int = NEVER
    window: Window | None = None
    max_slots: int = NEVER
    shareable_tokens: int = NEVER
    endless: bool = False
    layers: frozenset[int] | None = None


PLAIN = CachePlan()  # the whole cache as it is, read by every row; all layers


class Pooling(StrEnum):
    """One vector for a prompt: of its last token's hidden state, or the mean of all, after the final norm."""

    NONE = ""
    LAST = "last"
    MEAN = "mean"


class Wants(NamedTuple):
    """What a request wants of its prompt. prompt_logprobs: log-probabilities of each token and of the so many likeliest, None for
    none; pooling: its hidden states as one vector, and then no new tokens."""

    prompt_logprobs: int | None = None
    pooling: Pooling = Pooling.NONE

    @property
    def new_tokens(self) -> bool:
        return not self.pooling

    @property
    def whole_prompt(self) -> bool:
        """Whether every row of the prompt must run, so that none may come from the prefix cache."""
        return self.prompt_logprobs is not None or self.pooling is Pooling.MEAN


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"


NOTHING = Wants()


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences. `salt` separates tenants in the prefix cache."""

    id: str
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    priority: int = 0  # the lower, the sooner it is admitted and the later preempted; equal ones in order of arrival
    wants: Wants = NOTHING  # the prompt log-probabilities of `params` are added
    pooled: tuple[F64, int] | None = None  # (sum or last row, rows so far) of wants.pooling
    admitted: float | None = None  # when it first ran, in seconds of time.monotonic
    reuse: str = ""  # how the cache of `before` is taken over; empty: not at all
    before: list[int] = field(default_factory=list)  # the text that this one was made from by edits
    reused_tokens: int = 0  # taken over from it
    miss: Any = None  # where the prefix cache parts from the prompt, see PrefixTree.miss
    context: int | None = None  # tokens that count as given; None: the prompt. Behind them policies act as on new text
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] = field(default_factory=list)  # one entry for each prompt token, the first None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.wants = self.wants._replace(prompt_logprobs=self.params.prompt_logprobs)

    def embedding(self, normalize: bool) -> F64:
        """f64[hidden] of a prompt that was pooled and has run; of length 1 where `normalize`."""
        assert self.pooled is not None, f"request {self.id}: no row of the prompt was pooled"
        total, count = self.pooled
        found: F64 = total / count if self.wants.pooling is Pooling.MEAN else total
        return found / max(float(np.linalg.norm(found)), 1e-12) if normalize else found


@dataclass(eq=False)
class Sequence:
    """One text in the making. tokens[stored:] is `pending`: tokens whose keys are not in the cache yet.

    `sync_point` is a value of `stored` that no step may cross; the engine sets it (end of max_tokens, of the context,
    the fork of n > 1, a policy's next decision). `state` holds what each opened plugin's `begin` returned. `fault`: why
    the text continues without drafts, empty while it does not. `speculation`: its drafter and verifier, opened; `drafts`: nodes
    that a step may draft for it at most. `shareable_tokens`: leading tokens whose pages depend on these tokens alone. `spans`:
    text to take over from `source`, a sequence that holds it in the cache, when `stored` reaches it; `reuse_searched`: whether
    spans were searched for since the text was admitted.
    """

    id: int
    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    seed: int
    sync_point: int
    stored: int = 0
    cache: CachePlan = PLAIN
    shareable_tokens: int = NEVER
    reason: FinishReason | None = None
    state: dict[Any, Any] = field(default_factory=dict)
    fault: str = ""
    speculation: Any = None
    drafts: int = NEVER
    spans: list[Span] = field(default_factory=list)
    source: Sequence | None = None
    reuse_searched: bool = False

    @property
    def context(self) -> int:
        return self.prompt_len if self.request.context is None else self.request.context

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the request wants logits of the pending rows that are rows of the prompt."""
        return self.request.wants.prompt_logprobs is not None and self.stored < self.prompt_len - 1

    @property
    def pending(self) -> int:
        """How many tokens are not stored yet."""
        return len(self.tokens) - self.stored

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def advance(self, rows: int, accepted: tuple[int, ...], path: int) -> None:
        """After commit: `rows` pending tokens and `path` drafted ones are stored, `accepted` tokens are new."""
        self.stored += rows + path
        self.tokens += accepted
