"""Requests and sequences: all that outlives a step, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from redraft.config import SamplingParams
from redraft.core.tree import F64

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


class Pooling(StrEnum):
    """One vector for a prompt: of its last token's hidden state, or the mean of all, behind the final norm."""

    NONE = ""
    LAST = "last"
    MEAN = "mean"


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences. `salt` separates tenants in the prefix cache."""

    id: str
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    priority: int = 0  # the lower, the sooner it is admitted and the later preempted; equal ones in order of arrival
    pool: Pooling = Pooling.NONE  # what the rows of the prompt are made into behind the last layer
    pooled: Any = None  # (sum or last row, rows so far), see Engine.record
    admitted: float | None = None  # when it first ran, in seconds of time.monotonic
    reuse: str = ""  # how the cache of `before` is taken over; empty: not at all
    before: list[int] = field(default_factory=list)  # the text that this one was made from by edits
    reused_tokens: int = 0  # taken over from it
    miss: Any = None  # where the prefix cache parts from the prompt, see PrefixTree.miss
    context: int | None = None  # tokens that count as given; None: the prompt. Behind them policies act as on new text
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)  # one entry a prompt token once asked for, the first None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission

    def embedding(self, normalize: bool) -> F64:
        """f64[hidden] of a prompt that was pooled and has run; of length 1 where `normalize`."""
        total, count = self.pooled
        found: F64 = total / count if self.pool is Pooling.MEAN else total
        return found / max(float(np.linalg.norm(found)), 1e-12) if normalize else found

    @property
    def whole(self) -> bool:
        """Whether every row of the prompt must run, so that none may come from the prefix cache."""
        return self.params.prompt_logprobs is not None or self.pool is Pooling.MEAN


@dataclass(eq=False)
class Sequence:
    """One text in the making. tokens[stored:] is `pending`: tokens whose keys are not in the cache yet.

    `border` is a value of `stored` that no step may cross; the engine sets it (end of max_tokens, of the context,
    the fork of n > 1, a policy's next decision). `state` holds what each opened plugin's `begin` returned. `fault`: why
    this text goes on without drafts, empty while it does not. `policies`: what the request chose, opened, None where nothing.
    `speculation`: its drafter and verifier, opened; `drafts`: nodes that a step may draft for it at most.
    `format`, `block`: how its pages are stored, see View; `encoded`: every so many stored tokens full pages go over to
    `block`. `pure`: leading tokens whose pages depend on these tokens alone. `most`: slots that a lane may hold at most.
    `layers`: those that run behind the context, None for all. `spans`: text to take over from `source`, a sequence that
    holds it in the cache, where `stored` reaches it.
    """

    id: int
    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    seed: int
    border: int
    stored: int = 0
    lanes: Lanes = Lanes.SHARED
    reason: FinishReason | None = None
    state: dict[Any, Any] = field(default_factory=dict)
    fault: str = ""
    policies: Any = None
    speculation: Any = None
    drafts: int = NEVER
    format: str = ""
    block: str = ""
    encoded: int = NEVER
    pure: int = NEVER
    most: int = NEVER
    layers: frozenset[int] | None = None
    spans: list[Any] = field(default_factory=list)
    source: Sequence | None = None
    sought: bool = False  # whether spans were looked for since the text was admitted

    @property
    def context(self) -> int:
        return self.prompt_len if self.request.context is None else self.request.context

    @property
    def params(self) -> SamplingParams:
        return self.request.params

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
