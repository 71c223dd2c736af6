"""The seam between the sampler, which knows the distribution of the next token, and the verifier, which asks for it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from redraft.core.tree import F64, I32, Probs


class TopLogprobs(NamedTuple):
    """One drawn (or prompt) token: its log-probability and rank under the raw logits, and the k likeliest tokens."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Distribution(Probs, Protocol):
    """The target's distribution at the logit rows of one step; lazy: nothing of size V is made for a row nobody visits.

    `roots` is Batch.roots; node i of sequence s is row roots[s] + 1 + i.
    """

    @property
    def roots(self) -> I32: ...

    def only(self, indices: Seq[int]) -> Distribution:
        """The distribution as a verifier of some of the sequences sees it: their roots in place of all."""
        ...

    def draw(self, rows: Seq[int]) -> list[int]:
        """The token drawn at each row: processors on the row's own path, TARGET noise of its own position."""
        ...

    def uniform(self, rows: Seq[int], n: int) -> F64:
        """f64[R, n] in (0, 1): ACCEPT noise of each row's position, for the coins of a rule that rejects."""
        ...

    def choose(self, row: int, weights: F64) -> int:
        """A token drawn from `weights` (f64[V], of any sum) with RESIDUAL noise of the row's position."""
        ...

    def logprobs(self, rows: Seq[int], ids: Seq[int], k: int) -> list[TopLogprobs]:
        """log softmax of the raw logits of each row at `ids`, with the k largest."""
        ...
