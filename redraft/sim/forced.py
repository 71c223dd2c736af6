"""Texts that are known before they are generated: the requests, and the parts of an engine that draw forced tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.noise import Stream
from redraft.core.plan import Accepted, Budget, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import Stateless


@dataclass(eq=False)
class ForcedRequest(Request):
    """A request whose new tokens are `output`."""

    output: list[int] = field(default_factory=list)


def forced(number: int, prompt: list[int], output: list[int]) -> ForcedRequest:
    """Request `number`, which ends after the last token of `output`."""
    return ForcedRequest(str(number), prompt, _params(len(output)), output=output)


@lru_cache(maxsize=1 << 14)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True, draft_rows=0)


class Step(NamedTuple):
    """What the verifier gets in place of a distribution."""

    work: Seq[Work]

    def surprises(self, accepted: Seq[Accepted]) -> list[tuple[Sequence, float]]:
        """See Distribution.surprises: no text is sampled."""
        return []


class ForcedSampler:
    """In place of redraft.sample.sampler.Sampler: it needs no outputs of the model and knows no processors."""

    drafts, exact = Stream.TARGET, True

    def check(self, params: SamplingParams) -> None:
        pass

    def begin(self, seq: Sequence) -> None:
        pass

    def fork(self, state: None, seq: Sequence) -> None:
        pass

    def end(self, state: None) -> None:
        pass

    def constraint(self, seq: Sequence) -> None:
        pass

    def finished(self, seq: Sequence, tokens: Seq[int]) -> bool:
        return False

    def needs(self, work: Seq[Work]) -> Taps:
        return NO_TAPS

    def distribution(self, out: Any, batch: Batch, work: Seq[Work], trees: Seq[TokenTree]) -> Step:
        return Step(work)


class ForcedVerifier:
    """Accepts every draft, because `Ahead` drafts nothing but forced tokens, and adds the token after it."""

    card: ClassVar[Card] = Card("Forced tokens", "", Guarantee.NONE)
    supports: ClassVar[frozenset[Kind]] = frozenset({Kind.FIXED})
    drafts, exact = Stream.TARGET, True

    def accept(self, trees: Seq[TokenTree], distribution: Step) -> list[Accepted]:
        return [
            Accepted(tuple(range(len(tree))), tuple(_next(w.seq, len(tree) + 1))) if w.done else Accepted()
            for w, tree in zip(distribution.work, trees, strict=True)
        ]


class Ahead(Stateless):
    """A drafter that proposes the next forced tokens as a chain, as many as the budget allows. A chain of k tokens makes one step of the
    engine do what k + 1 steps do."""

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [_chain(_next(seq, budget.rows)) if budget.rows else EMPTY for seq, budget in zip(seqs, budgets, strict=True)]


def _next(seq: Sequence, count: int) -> list[int]:
    """The next `count` tokens of the text."""
    request = seq.request
    assert isinstance(request, ForcedRequest)
    return request.output[seq.generated : seq.generated + count]


def _chain(tokens: list[int]) -> TokenTree:
    parents, kinds = _shape(len(tokens))
    return TokenTree(np.array(tokens, np.int32), parents, kinds)


@lru_cache(maxsize=1024)
def _shape(count: int) -> tuple[Any, Any]:
    return np.arange(-1, count - 1, dtype=np.int32), np.zeros(count + 1, np.uint8)
