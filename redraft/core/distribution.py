"""The interface between the sampler, which computes the distribution of the next token, and the verifier, which uses it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

from redraft.core.tree import F64, I32, Probs

Tensor = Any


class TopLogprobs(NamedTuple):
    """One drawn token or prompt token: its log-probability and rank under the raw logits, and the k likeliest tokens."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Distribution(Probs, Protocol):
    """The target's distribution at the logit rows of one step. It is lazy: a row that is never used costs nothing of size V.

    `roots` is Batch.roots. Node i of sequence s is row roots[s] + 1 + i.
    """

    @property
    def roots(self) -> I32: ...

    def only(self, indices: Seq[int]) -> Distribution:
        """The same distribution with the roots of the sequences `indices` only."""
        ...

    def draw(self, rows: Seq[int]) -> list[int]:
        """The token drawn at each row, with processors applied on the path of the row and TARGET noise of its position."""
        ...

    def uniform(self, rows: Seq[int], n: int) -> F64:
        """f64[R, n] in (0, 1): ACCEPT noise of each row's position, for rejection rules."""
        ...

    def choose(self, row: int, weights: F64) -> int:
        """A token drawn in proportion to `weights` (f64[V], any sum) with RESIDUAL noise of the row's position."""
        ...

    def states(self, rows: Seq[int], layer: int) -> Tensor:
        """[R, hidden] in the model's dtype: outputs of a layer that the verifier's taps name, at these rows. The last layer's have no norm
        yet."""
        ...

    def allows(self, row: int, token: int) -> bool:
        """Whether the request's processors leave the token a chance at this row."""
        ...

    def logprobs(self, rows: Seq[int], ids: Seq[int], k: int) -> list[TopLogprobs]:
        """The log softmax of the raw logits of each row at `ids`, with the k likeliest tokens."""
        ...
