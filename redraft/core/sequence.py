"""Requests and sequences: all that outlives a step, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from redraft.config import SamplingParams


class Lanes(StrEnum):
    """How many growing arrays of slots a sequence has in the cache."""

    SHARED = "shared"  # one for the whole model
    PER_LAYER = "per-layer"
    PER_HEAD = "per-head"  # one for each layer and kv head


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
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)  # one entry a prompt token once asked for, the first None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission


@dataclass(eq=False)
class Sequence:
    """One text in the making. tokens[stored:] is `pending`: tokens whose keys are not in the cache yet.

    `border` is a value of `stored` that no step may cross; the engine sets it (end of max_tokens, of the context,
    the fork of n > 1, a policy's next decision). `state` holds what each opened plugin's `begin` returned. `fault`: why
    this text goes on without drafts, empty while it does not.
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
