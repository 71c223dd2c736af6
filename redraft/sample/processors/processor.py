"""The interface of logits processors, and functions that filters share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from redraft.config import SamplingParams
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree
from redraft.errors import RedraftError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
S = TypeVar("S")

UNLIKELY = 32.0  # bits: the surprise of a token that a lossy verifier accepted although no filter left it
FEW = 256  # up to this many keys are sorted instead of put into buckets
BUCKETS = 1024


@dataclass(frozen=True)
class Vocabulary:
    """size: the number of ids; eos: the ids that end a text; encode: all token id sequences that spell a text, for example with
    and without a leading space; bytes_of: the bytes that a token adds to a text, possibly part of a character; plain: the ids of a
    text, without special tokens around it; special: ids that are no text. encode, bytes_of and plain are None without a tokenizer."""

    size: int
    eos: frozenset[int]
    encode: Callable[[str], list[list[int]]] | None = None
    bytes_of: Callable[[int], bytes] | None = None
    plain: Callable[[str], list[int]] | None = None
    special: frozenset[int] = frozenset()
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def shared(self, kind: Callable[[Vocabulary], S]) -> S:
        """What `kind` makes of this vocabulary. It is made once, for all processors."""
        if kind not in self._shared:
            self._shared.setdefault(kind, kind(self))
        found: S = self._shared[kind]
        return found


class TextError(RedraftError):
    """An error of one text, which ends its request alone."""

    def __init__(self, seq: Sequence, message: str) -> None:
        super().__init__(message)
        self.seq = seq


@dataclass(slots=True)
class Row:
    """One row of logits. values: f64[M], the logits of the remaining tokens; ids: i64[M], their ids, ascending; drafted: the tokens
    on the row's path after seq.tokens. Until the first filter, ids has all ids, so an id is its own place. parent: returns the processed
    row from which the last drafted token is drawn, None where it is not known."""

    ids: I64
    values: F64
    seq: Sequence
    drafted: list[int]
    parent: Callable[[], Row] | None = None

    @property
    def generated(self) -> int:
        """The number of new tokens before the token that this row draws."""
        return self.seq.generated + len(self.drafted)

    @property
    def position(self) -> int:
        """The index in the text of the token that this row draws."""
        return len(self.seq.tokens) + len(self.drafted)

    def surprise(self, token: int) -> float:
        """-log2 of the probability with which this row draws `token`."""
        place = int(np.searchsorted(self.ids, token))
        weights = weigh(self.values)
        if place == len(self.ids) or self.ids[place] != token or not weights[place]:
            return UNLIKELY
        return float(-np.log2(weights[place] / weights.sum()))

    def surprises(self) -> tuple[float, int]:
        """The sum of the surprises of the new tokens before this row's, and their number. Needs a `Feedback`. Drafted tokens count only
        where their rows are known."""
        if not self.drafted or self.parent is None:
            return self.seq.surprise, self.seq.generated
        before = self.parent()
        total, count = before.surprises()
        return total + before.surprise(self.drafted[-1]), count + 1

    def keep(self, places: I64) -> None:
        """Drops all tokens except those at `places` (ascending)."""
        self.ids, self.values = self.ids[places], self.values[places]


class Processor(Protocol):
    """One processor of one request. It is built again after a preemption and for each of n texts. Its state may follow seq.tokens,
    which only grow, but not drafted tokens, which may be rejected; `Path` keeps the two apart. A processor that also ends texts
    derives from `Ending`. One that finds tokens by their id says so: `by_id = True`."""

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        """The processor for a request, or None if the request does not need it. Raises InvalidInput for bad parameters."""
        ...

    def apply(self, row: Row) -> None:
        """Changes row.values in place or drops tokens with row.keep. Only processors before the first filter may index by id."""
        ...


class Feedback:
    """A processor that reacts to how likely the text's tokens were: see Row.surprises. Such a state does not follow from tokens, so it
    stays with the sequence."""


class Ending(ABC):
    """A processor that can end a text, such as a grammar."""

    @abstractmethod
    def finished(self, seq: Sequence, tokens: Seq[int]) -> bool:
        """Whether the text is complete after seq.tokens and `tokens`, without an end-of-text token. min_tokens takes precedence."""


class Constraint(ABC):
    """A processor that drops tokens and changes no logits, so that it can also say which drafts are in vain. name: of the tokens that it
    drafts itself, in statistics."""

    name: str

    @abstractmethod
    def allows(self, seq: Sequence, drafted: Seq[int], token: int) -> bool:
        """Whether `token` may follow seq.tokens and `drafted`."""

    @abstractmethod
    def prepare(self, seq: Sequence) -> None:
        """Begins to compute what the row after seq.tokens will need, while the model runs."""

    @abstractmethod
    def fit(self, seq: Sequence, tree: TokenTree, budget: Budget, origin: int) -> TokenTree:
        """A tree without nodes that cannot be accepted, and with tokens that must follow. `origin`: of the nodes that it adds."""


class Context:
    """The tokens on a row's path as an array: those of the text, then the drafted ones. A token that stands in for a vector is a number
    below 0 that occurs once."""

    def __init__(self) -> None:
        self._committed = np.zeros(0, np.int64)

    @staticmethod
    def prompt(seq: Sequence) -> list[int]:
        tokens, vectors = seq.tokens[: seq.prompt_len], seq.request.vectors
        if vectors is None:
            return tokens
        return [token if np.isnan(vector[0]) else -1 - i for i, (token, vector) in enumerate(zip(tokens, vectors, strict=True))]

    def at(self, row: Row) -> I64:
        """i64[row.position]"""
        if len(self._committed) != len(row.seq.tokens):
            start = self._committed if len(self._committed) else np.asarray(self.prompt(row.seq), np.int64)
            self._committed = np.concatenate([start, np.asarray(row.seq.tokens[len(start) :], np.int64)])
        return np.concatenate([self._committed, np.asarray(row.drafted, np.int64)]) if row.drafted else self._committed


class LazyCheck(ABC):
    """A processor that is asked about single tokens after all others, in the order in which they would be drawn, until it allows one."""

    @abstractmethod
    def allows(self, seq: Sequence, drafted: Seq[int], token: int) -> bool:
        """Whether `token` may follow seq.tokens and `drafted`."""


class Path(Generic[S]):
    """A state that depends on every token of a row's path: the committed tokens, then the drafted tokens of its tree node.

    `begin` returns the state after the prompt, `advance` the state after one more token. Neither may modify a state, because the
    nodes of a tree share the states of their ancestors. Each node is computed once a step.
    """

    def __init__(self, begin: Callable[[Sequence], S], advance: Callable[[S, int], S]) -> None:
        self._begin, self._advance = begin, advance
        self._upto = -1  # committed tokens in the state at ()
        self._states: dict[tuple[int, ...], S] = {}  # by drafted tokens

    def at(self, seq: Sequence, drafted: Seq[int]) -> S:
        """The state after seq.tokens and `drafted`."""
        if self._upto != len(seq.tokens):
            self._follow(seq)
        state = self._states[()]
        for end in range(1, len(drafted) + 1):
            node = tuple(drafted[:end])
            if node not in self._states:
                self._states[node] = self._advance(state, node[-1])
            state = self._states[node]
        return state

    def _follow(self, seq: Sequence) -> None:
        state = self._begin(seq) if self._upto < 0 else self._states[()]
        for token in seq.tokens[max(self._upto, seq.prompt_len) :]:
            state = self._advance(state, token)
        self._upto, self._states = len(seq.tokens), {(): state}


def repetitions(tokens: I64, longest: int) -> dict[int, int]:
    """Token -> the length of the longest end of `tokens`, at most `longest`, that occurred before with this token behind it."""
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:-1] == tokens[last])  # of earlier occurrences; tokens below 0 occur once
    found: dict[int, int] = {}
    n = 1
    while len(ends):
        found |= dict.fromkeys((token for token in tokens[ends + 1].tolist() if token >= 0), n)
        if n == longest:
            break
        ends = ends[ends >= n]
        ends = ends[tokens[ends - n] == tokens[last - n]]
        n += 1
    return found


def largest(keys: F64, weights: F64, wanted: float) -> I64:
    """The places, ascending, of the fewest largest keys with weights that sum to `wanted`. Of equal keys the first come first.

    To avoid sorting all keys, they are put into buckets of equal width. All buckets before the one that reaches the sum are
    included, and only the keys of that bucket are examined again.
    """
    inside = np.zeros(len(keys), bool)
    places = np.arange(len(keys))  # of the keys not decided yet
    while len(places) > FEW and (width := _width(keys)) > 0:
        bucket = np.minimum((keys.max() - keys) / width, BUCKETS).astype(np.int64)
        sums = np.cumsum(np.bincount(bucket, weights, BUCKETS + 1))
        reached = int(np.searchsorted(sums, wanted))
        inside[places[bucket < reached]] = True
        wanted -= sums[reached - 1] if reached else 0
        rest = np.flatnonzero(bucket == reached)
        places, keys, weights = places[rest], keys[rest], weights[rest]
    order = np.argsort(-keys, kind="stable")
    inside[places[order[: int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1]]] = True
    return np.flatnonzero(inside)


def _width(keys: F64) -> float:
    """The width of the buckets; 0 if all finite keys are equal or there are none."""
    finite = keys[keys > -np.inf]
    return float(finite.max() - finite.min()) / BUCKETS if len(finite) else 0.0


def weigh(values: F64) -> F64:
    """exp(values), scaled so that the largest is 1; all 1 if every token is banned."""
    top = values.max()
    return np.exp(values - top) if top > -np.inf else np.ones_like(values)
