"""Requests and sequences: the state that outlives a step."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from redraft.config import SamplingParams
from redraft.core.distribution import TopLogprobs
from redraft.core.layers import Between, Layers
from redraft.core.tree import F32, F64, I32
from redraft.core.view import Parallel, Window

if TYPE_CHECKING:
    from redraft.kv.eviction.eviction import OpenEviction
    from redraft.kv.reuse.reuse import OpenReuse, Reusing
    from redraft.kv.sparse_attention.sparse_attention import OpenSparseAttention
    from redraft.layer_skipping.layer_skipping import OpenLayerSkipping
    from redraft.steer.steer import OpenSteer

UNLIMITED = 1 << 30  # more tokens than any text has


class Onset(NamedTuple):
    """When an eviction policy begins to act on a text. at: the committed tokens at its first eviction; shareable: the number of leading
    tokens with the same keys as without the policy; skippable: the number of leading tokens whose rows it does not watch; slots:
    committed slots right after the first eviction, most: at any time after it, both on average over the lanes; longest: the most in
    any lane after it."""

    at: int = UNLIMITED
    shareable: int = UNLIMITED
    skippable: int = UNLIMITED
    slots: int = 0
    most: int = UNLIMITED
    longest: int = UNLIMITED


NEVER = Onset()


class Lanes(StrEnum):
    """The kind of lanes of a sequence. A lane is a growing array of slots in the cache."""

    SHARED = "shared"  # one for the whole model
    PER_LAYER = "per-layer"
    PER_HEAD = "per-head"  # one for each layer and kv head


class Space(NamedTuple):
    """Pages of one size: a lane kind and the name of a format, empty for plain keys and values."""

    lanes: Lanes = Lanes.SHARED
    format: str = ""


@dataclass(frozen=True, eq=False)
class CachePlan:
    """How the cache of a text is stored, evicted and read: the opened methods that the request chose, and what follows from them.

    keep: the eviction policy; read: the sparse attention; reuse: the reuse of the cache of an edited text; each is None if the request
    chose none. lanes: the lane kind of the sequence. format, encoded: names of page formats, empty for plain keys and values (see View).
    encode_every: the number of tokens after which full pages change from `format` to `encoded`. window: what rows see, None for all.
    shareable: whether pages before the first eviction have the bits of a plain text. endless: positions may exceed the trained
    context, because distances within the cache do not. depth: the layer skipping behind the context, None where all layers run.
    steer: what changes hidden states between layers, None for nothing.
    """

    keep: OpenEviction | None = None
    read: OpenSparseAttention | None = None
    reuse: OpenReuse | None = None
    lanes: Lanes = Lanes.SHARED
    format: str = ""
    encoded: str = ""
    encode_every: int = UNLIMITED
    window: Window | None = None
    shareable: bool = True
    endless: bool = False
    depth: OpenLayerSkipping | None = None
    steer: OpenSteer | None = None

    @property
    def merges(self) -> bool:
        """Whether evictions write kept slots, in pages that no other text lists."""
        return self.keep is not None and self.keep.merges

    @property
    def demotes(self) -> bool:
        """Whether slots that the eviction policy does not keep stay, in encoded pages."""
        return bool(self.encoded) and self.encode_every == UNLIMITED

    @property
    def splits(self) -> bool:
        """Whether a text begins with one lane for all heads, as plain texts have, and gets its own lanes at the first eviction."""
        return self.lanes is not Lanes.SHARED and not self.format and not self.encoded

    @property
    def shares(self) -> bool:
        """Whether a text can begin with pages of other texts."""
        return self.splits or self.lanes is Lanes.SHARED


PLAIN = CachePlan()  # the whole cache, unencoded; every row reads all of it and runs all layers


class Pooling(StrEnum):
    """One vector for a prompt: the hidden state of its last token, or the mean over its tokens, after the final norm."""

    NONE = ""
    LAST = "last"
    MEAN = "mean"


class Wants(NamedTuple):
    """The results that a request wants for its prompt. prompt_logprobs: return the log-probability of each token and of this many
    likeliest tokens, None for none; pooling: return the hidden states as one vector and generate no new tokens; logprobs_of: the
    tokens that need a log-probability, by their place in the prompt, 1 or more and ascending; None for all."""

    prompt_logprobs: int | None = None
    pooling: Pooling = Pooling.NONE
    logprobs_of: Seq[int] | None = None

    @property
    def new_tokens(self) -> bool:
        return not self.pooling

    @property
    def skippable(self) -> int:
        """The number of leading rows of the prompt that need not run, so that they may come from the prefix cache."""
        if self.pooling is Pooling.MEAN:
            return 0
        if self.prompt_logprobs is None:
            return UNLIMITED
        if self.logprobs_of is None:
            return 0
        return self.logprobs_of[0] - 1 if self.logprobs_of else UNLIMITED


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"


NO_WANTS = Wants()


@dataclass(eq=False)
class Group:
    """Requests of a batch whose prompts begin with the same tokens. prefix: these tokens, whole pages; held: whether the prefix stays in
    the cache until the last of the requests has ended, which is given up where memory is short."""

    prefix: tuple[int, ...]
    held: bool = True


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences. `salt` separates tenants in the prefix cache."""

    id: str
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    hidden: bool = False  # its texts are computed for the cache only, and nobody gets their events
    leaves: bool = False  # its texts leave the engine after their first new tokens
    priority: int = 0  # lower values are admitted sooner and preempted later; equal values in order of arrival
    wants: Wants = NO_WANTS  # the prompt log-probabilities of `params` are added
    pooled: tuple[F64, int] | None = None  # (sum or last row, rows so far) of wants.pooling
    arrived: float | None = None  # time when it was added to the engine, in seconds of the engine's clock
    admitted: float | None = None  # time of the first run, by the same clock
    adapter: Any = None  # what changes the model's weights for this request, else that of params.lora (models/adapter.py)
    reuse: str = ""  # the method that reuses the cache of `before`; empty for none
    before: list[int] = field(default_factory=list)  # the text before the edits
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (first, end) of parts of the prompt that other prompts have too
    spans: Any = None  # what its reuse method found when its first text started
    reused_tokens: int = 0  # tokens reused from the cache of other texts
    repaired_tokens: int = 0  # of these and what stands between them, those that ran again through all layers
    repair_rows: float = 0.0  # all that ran again, in whole rows
    miss: Any = None  # where the prompt differs from the prefix cache, see PrefixTree.miss
    vectors: F32 | None = None  # [prompt, hidden]: stand in for the embeddings of the prompt's tokens, but for rows of NaN
    context: int | None = None  # tokens that count as given, None for the prompt; policies treat later tokens as new text
    group: Group | None = None  # with what other requests of a batch it shares its first tokens
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] = field(default_factory=list)  # of each prompt token, None where wants.logprobs_of has none
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    disk_tokens: int = 0  # those of them that were on disk
    disk_seconds: float = 0.0  # that it took to read them

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.wants = self.wants._replace(prompt_logprobs=self.params.prompt_logprobs)

    def embedding(self, normalize: bool) -> F64:
        """f64[hidden]: the pooled vector of a prompt that has run, scaled to length 1 if `normalize`."""
        assert self.pooled is not None, f"request {self.id}: no row of the prompt was pooled"
        total, count = self.pooled
        found: F64 = total / count if self.wants.pooling is Pooling.MEAN else total
        return found / max(float(np.linalg.norm(found)), 1e-12) if normalize else found


class Rerun(NamedTuple):
    """Committed rows that run again and write their keys and values in place, ascending. Each sees the slots up to its own, so the result
    does not depend on how they are cut into steps. slots: i32[rows]; layers: those that run, None for all; share: the part of a row's
    time that they take."""

    slots: I32
    layers: Layers | None = None
    share: float = 1.0

    def within(self, rows: int) -> Rerun | None:
        """As many of the first rows as take the time of `rows` whole ones; None if that is none."""
        most = int(rows / self.share)
        return self._replace(slots=self.slots[:most]) if most else None

    def after(self, count: int) -> Rerun | None:
        """What is left when the first `count` rows ran; None if nothing."""
        return self._replace(slots=self.slots[count:]) if count < len(self.slots) else None

    @property
    def cost(self) -> int:
        """The time in whole rows, at least one."""
        return math.ceil(len(self.slots) * self.share)


_HOLDERS = count(-1, -1)  # ids of sequences that never run


@dataclass(eq=False)
class Sequence:
    """One text that is being generated. tokens[stored:] are pending: their keys are not in the cache yet.

    sync_point: a value of `stored` that no step may cross; the engine sets it (the end of max_tokens or of the context, the fork of n > 1,
    the next decision of a policy). synced: `stored` when the engine last published pages and set sync_point. state: what `begin` of each
    opened plugin returned. fault: why the text continues without drafts, empty if it does not. speculation: the opened drafter and
    verifier. drafts: the largest number of nodes that a step may draft. rest: the number of further steps in which its drafter, which sets
    it, need not be asked nor see the step. constrained: whether the request has a constraint, which drafts tokens of its own. onset: when
    its eviction policy begins to act. parallel: how rows behind its chunks weigh these, see Parallel. shareable_tokens: the number of
    leading tokens with pages that depend on these tokens only. reusing: how far the reuse of other texts' cache is, None before the search
    for them. arrives: the number of leading tokens whose pages come from another engine or from disk when the text is admitted. layers:
    those that the next step's rows run, None for all. between: what changes their hidden states between layers, None for nothing. rerun:
    committed rows that run again before pending ones. checked: whether a control of the request checks drawn tokens; reacts: whether a
    processor of it reacts to how likely the new tokens were; surprise: if so, the sum of -log2 of the probabilities with which they were
    drawn.
    """

    id: int
    request: Request
    index: int
    tokens: list[int]
    prompt_len: int
    seed: int
    sync_point: int
    stored: int = 0
    synced: int = -1
    cache: CachePlan = PLAIN
    onset: Onset = NEVER
    parallel: Parallel | None = None
    shareable_tokens: int = UNLIMITED
    reason: FinishReason | None = None
    state: dict[Any, Any] = field(default_factory=dict)
    fault: str = ""
    speculation: Any = None
    drafts: int = UNLIMITED
    rest: int = 0
    constrained: bool = False
    reusing: Reusing | None = None
    arrives: int = 0
    layers: Layers | None = None
    between: Between | None = None
    checked: bool = False
    reacts: bool = False
    surprise: float = 0.0
    rerun: Rerun | None = None

    @classmethod
    def holder(cls, request: Request, tokens: list[int]) -> Sequence:
        """A sequence that never runs: it keeps tokens of a request's cache. The last token is not stored."""
        return cls(next(_HOLDERS), request, 0, tokens, len(tokens), 0, 0)

    @property
    def context(self) -> int:
        return self.prompt_len if self.request.context is None else self.request.context

    @property
    def reads_from(self) -> int:
        """The first position at which its sparse read selects."""
        return self.context if self.cache.read is None else min(self.context, self.cache.read.inside)

    @property
    def skippable(self) -> int:
        """The number of leading tokens that may come from pages of other texts."""
        read = UNLIMITED if self.cache.read is None else self.cache.read.skippable
        return min(self.shareable_tokens, self.onset.skippable, read, self.request.wants.skippable) if self.cache.shares else 0

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def words(self) -> list[int]:
        """The prompt's tokens, without those that only stand in for a vector."""
        prompt, vectors = self.tokens[: self.prompt_len], self.request.vectors
        return prompt if vectors is None else [token for token, (one, *_) in zip(prompt, vectors, strict=True) if np.isnan(one)]

    @property
    def pending(self) -> int:
        """The number of tokens that are not stored yet."""
        return len(self.tokens) - self.stored

    @property
    def drawing(self) -> bool:
        """Whether the next row draws a token."""
        return self.pending == 1 and self.rerun is None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def advance(self, rows: int, accepted: tuple[int, ...], path: int) -> None:
        """Updates the text after a commit that stored `rows` pending and `path` drafted tokens; `accepted` are the new tokens."""
        self.stored += rows + path
        self.tokens += accepted
