"""A model that reads only the parts of a long prompt that matter drafts a chain: its own cache stays small.

Guanzheng Chen, Qilong Feng, Jinjie Ni, Xin Li, Michael Qizhe Shieh: Long-Context Inference with Retrieval-Augmented Speculative
Decoding, 2025, arXiv 2502.20330.

1. Cut the prompt before its last `query` tokens into chunks of `chunk` tokens and score each by BM25 for the query, with tokens as words.
2. The draft model reads the best chunks, in the order of the text, then the query: about `context` tokens. The text that follows is the
   same for both models.
3. Draft a chain as with a draft model. The target reads the whole prompt and verifies.

Differs: BM25 in place of an embedding model. The draft model may be the target's own checkpoint, loaded twice. Verifier `rapid` is the
paper's rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.draft.draft_model import DraftModel
from redraft.draft.second import SecondModelDrafter
from redraft.options import number

K1, B = 1.2, 0.75  # of BM25: how fast repeats count less, how much long chunks do


@dataclass(frozen=True)
class RapidDraft(DraftModel):
    """context: the most prompt tokens that the draft model reads; query, chunk: tokens of the end that is always read, and of a part;
    length, stop, least: as for draft-model."""

    context: int = number(1024, ge=1)
    chunk: int = number(128, ge=1)
    query: int = number(128, ge=1)
    length: int = number(10, ge=1)

    card: ClassVar[Card] = Card(
        "RAPID",
        "Chen, Feng, Ni, Li, Shieh, Long-Context Inference with Retrieval-Augmented Speculative Decoding, 2025, arXiv 2502.20330",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary, or the target again",
        deviates="BM25 in place of an embedding model",
        summary="A model reads parts of the prompt; for long prompts",
    )

    def open(self, runner: Any, sampler: Any) -> Retrieving:
        from redraft.models.draft_model import load_draft_model

        return Retrieving(self, load_draft_model(runner, self.model), sampler)

    def shortened(self, prompt: Seq[int]) -> list[int]:
        """Step 1 and 2; the whole prompt if it is short enough."""
        if len(prompt) <= self.context:
            return list(prompt)
        query = list(prompt[-min(self.query, self.context) :])
        before = prompt[: -len(query)]
        chunks = [list(before[i : i + self.chunk]) for i in range(0, len(before), self.chunk)]
        best = ranked(chunks, query)[: (self.context - len(query)) // self.chunk]
        return [*(token for i in sorted(best) for token in chunks[i]), *query]


class Retrieving(SecondModelDrafter):
    """The opened form. The draft model's text is a short prompt and what followed the whole one."""

    method: RapidDraft

    def _begins(self, seq: Sequence) -> tuple[list[int], int]:
        if not self._knows(seq, seq.tokens):
            return [], 0
        return self.method.shortened(seq.tokens[: seq.prompt_len]) + seq.tokens[seq.prompt_len :], len(seq.tokens)


def ranked(chunks: Seq[Seq[int]], query: Seq[int]) -> list[int]:
    """Indices of chunks, the best by BM25 first; of equal ones the later."""
    counts = [Counter(chunk) for chunk in chunks]
    holding = Counter(token for one in counts for token in one)
    mean = sum(map(len, chunks)) / max(1, len(chunks))
    wanted = {token: log(1 + (len(chunks) - holding[token] + 0.5) / (holding[token] + 0.5)) for token in {*query} if token in holding}

    def score(i: int) -> float:
        weight = K1 * (1 - B + B * len(chunks[i]) / mean)
        return sum(rare * counts[i][token] * (K1 + 1) / (counts[i][token] + weight) for token, rare in wanted.items())

    return sorted(range(len(chunks)), key=lambda i: (-score(i), -i))
