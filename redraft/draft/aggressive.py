"""Copies from a text that the output is expected to resemble, and where they differ waits until they meet again.

Tao Ge, Heming Xia, Xin Sun, Si-Qing Chen, Furu Wei: Lossless Acceleration for Seq2seq Generation with Aggressive
Decoding, 2022, arXiv 2205.10350 (its input-guided half, IAD).

1. The source is the request's `prediction`, or its prompt where it has none. Index all its 1- to 3-grams.
2. A prediction is copied from its first token on; a prompt from where the output first meets it.
3. As long as the output goes on as the source does, draft the source's next tokens, at most `block` and never past its end.
4. After a difference take the last n tokens of the output, n = 1, 2, 3. Absent from the source: not joined. There once:
   copy what follows it there. There several times: try n + 1; at 3 still several: not joined. Try again at each token.

Differs: drafts are cut at `block`, since all behind the first difference is wasted; after a difference they begin short
and grow with the tokens that agree; the source may be the whole prompt. The paper's other half, GAD, needs a trained
non-autoregressive model and is not here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless
from redraft.options import Options, number

LONGEST = 3  # tokens of an n-gram
SEVERAL = -1


class Source:
    """A text to copy from. ends: n-gram -> where its only occurrence ends, or SEVERAL."""

    def __init__(self, tokens: Seq[int]) -> None:
        self.tokens = tuple(tokens)
        self.ends: dict[tuple[int, ...], int] = {}
        for n in range(1, LONGEST + 1):
            for end in range(n, len(self.tokens) + 1):
                gram = self.tokens[end - n : end]
                self.ends[gram] = SEVERAL if gram in self.ends else end

    def meet(self, output: Seq[int]) -> int | None:
        """Where the source goes on behind the last tokens of `output`, or None."""
        for n in range(1, min(LONGEST, len(output)) + 1):
            end = self.ends.get(tuple(output[-n:]))
            if end != SEVERAL:
                return end
        return None


@dataclass
class Pointer:
    """Where one sequence stands in its source: a function of its tokens alone. at: the place of the token expected next,
    None: not joined; agreed: tokens that went as expected since they met; seen: tokens followed so far."""

    source: Source
    at: int | None
    agreed: int
    seen: int

    def follow(self, tokens: list[int], prompt_len: int) -> None:
        for place in range(self.seen, len(tokens)):
            if self.at is not None and self.source.tokens[self.at : self.at + 1] == (tokens[place],):
                self.at += 1
                self.agreed += 1
            else:
                self.at = self.source.meet(tokens[max(prompt_len, place + 1 - LONGEST) : place + 1])  # 4.
                self.agreed = 0
        self.seen = len(tokens)


@dataclass(frozen=True)
class Aggressive(Options, Stateless):
    """block: most tokens drafted; first: tokens drafted where output and source just met; each that agrees allows one more.

    Random edits of the suite's prompts as output, 16 rows a step: at one edit in 20 tokens first = 1, 4, 16 give 3.04, 3.53,
    4.11 tokens a step for 2.8, 3.6, 5.6 drafted. On pilot-16m's own code edits, which are no copies, they waste 0.2, 0.6, 2.2.
    """

    block: int = number(32, ge=1)
    first: int = number(4, ge=1)

    card: ClassVar[Card] = Card(
        "Aggressive decoding",
        "Ge, Xia, Sun, Chen, Wei, Lossless Acceleration for Seq2seq Generation with Aggressive Decoding, 2022, arXiv 2205.10350",
        Guarantee.SAME_TEXT,
        deviates="drafts are cut, and grow again after a difference; the prompt is the source of a request without a prediction",
        summary="Copies from an expected text; edits and rewrites",
    )

    def open(self, runner: Any, sampler: Any) -> Aggressive:
        return self

    def begin(self, seq: Sequence) -> Pointer:
        given = seq.params.prediction
        assert not isinstance(given, str), "the engine takes predictions as token ids"
        if given is None:
            return Pointer(Source(seq.request.prompt), None, 0, seq.prompt_len)  # 1.
        return Pointer(Source(given), 0, self.block, seq.prompt_len)  # 2.

    def fork(self, state: Pointer, seq: Sequence) -> Pointer:
        return replace(state)

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A chain for each sequence that stands in its source."""
        return [self._copy(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def _copy(self, seq: Sequence, budget: Budget) -> TokenTree:
        state: Pointer = seq.state[self]
        state.follow(seq.tokens, seq.prompt_len)
        most = min(self.block, self.first + state.agreed, *budget)
        if state.at is None or most < 1:
            return EMPTY
        return TokenTree.chain(state.source.tokens[state.at : state.at + most])  # 3.
