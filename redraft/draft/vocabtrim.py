"""Trims the head of a draft model to the most frequent tokens, so drafting costs less. The target keeps its whole head.

Raghavv Goel, Sudhanshu Agrawal, Mukul Gagrani, Junyoung Park, et al.: VocabTrim: Vocabulary Pruning for Efficient
Speculative Decoding in LLMs, 2025, arXiv 2506.22694.

1. Count the target's tokens in a text. The best text is the target's own output for similar prompts.
2. Keep the `keep` most frequent tokens, ties by id. Always keep ends of text, special tokens, newline and digits.
3. The draft model's head keeps only the rows of these tokens. Its embedding stays whole.
4. The draft distribution is 0 for all other tokens, so only kept tokens are drafted. The target's distribution is unchanged.

Differs: logits are expanded to the whole vocabulary before the request's processors, which address tokens by id. So only the
head's matrix product gets cheaper, not the passes over a row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import I64, TokenTree
from redraft.draft.drafter import Drafter, OpenDrafter, Wrapper, max_bytes
from redraft.errors import InvalidInput, Unsupported
from redraft.models.frequent import kept
from redraft.models.tokenizer import Tokenizer
from redraft.options import Options, number


class WithHead(OpenDrafter, Protocol):
    """An opened drafter with a model of its own."""

    def trim(self, keep: I64) -> None: ...


@dataclass(frozen=True)
class VocabTrim(Options):
    """draft: the drafter with the model to trim, options in parentheses; keep: tokens to keep besides those of step 2 that are
    always kept; text: a UTF-8 file, such as answers of the target."""

    draft: str = "draft-model"
    keep: int = number(2048, ge=1)
    text: Path | None = None

    card: ClassVar[Card] = Card(
        "VocabTrim",
        "Goel, Agrawal, Gagrani, Park, et al., VocabTrim: Vocabulary Pruning for Efficient Speculative Decoding in LLMs, 2025, "
        "arXiv 2506.22694",
        Guarantee.SAME_TEXT,
        needs="a drafter with a second model and a text to count tokens in",
        deviates="only the head's matrix product gets smaller; processors see logits of full width",
        summary="Trims a draft model's head; large vocabularies",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None:
            raise InvalidInput("vocabtrim:text=none: must be a text file, best with answers of the target")
        self.made()

    def made(self) -> Drafter:
        (inner,) = registry.split(self.draft, "\n")  # without its parentheses
        return cast(Drafter, registry.create("draft", inner))

    def max_bytes(self, runner: Any) -> int:
        """Without the rows of the head: their size is unknown until the draft model is loaded."""
        return max_bytes(self.made(), runner)

    def open(self, runner: Any, sampler: Any) -> Trimmed:
        opened = self.made().open(runner, sampler)
        if not hasattr(opened, "trim"):
            raise Unsupported(f"vocabtrim:draft={self.draft}: this drafter has no second model to trim")
        vocabulary, tokenizer = sampler.vocabulary, Tokenizer(runner.source)
        keep = kept(tokenizer.encode(self._read(), special=False), self.keep, tokenizer, vocabulary.eos, vocabulary.size)  # 1., 2.
        return Trimmed(cast(WithHead, opened), keep, vocabulary.size)

    def _read(self) -> str:
        assert self.text is not None
        try:
            return self.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InvalidInput(f"vocabtrim:text={self.text}: cannot be read ({reason})") from None


class Trimmed(Wrapper):
    """The opened form. keep: i64[k], ascending, the tokens that can be drafted; if it has all `vocab` tokens, nothing changes."""

    def __init__(self, drafter: WithHead, keep: I64, vocab: int) -> None:
        super().__init__([drafter])
        self.keep = keep
        self._kept = np.isin(np.arange(vocab), keep)
        self._seen = self._inside = 0
        if len(keep) < vocab:
            drafter.trim(keep)  # 3.

    @property
    def coverage(self) -> float:
        """The share of generated tokens that are in `keep`. If it is low, the text of step 1 does not resemble this traffic."""
        return self._inside / self._seen if self._seen else 1.0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return self.parts[0].propose(seqs, budgets)  # 4.

    def observe(self, result: StepResult) -> None:
        super().observe(result)
        tokens = [token for accepted in result.accepted for token in accepted.tokens]
        self._seen += len(tokens)
        self._inside += int(self._kept[tokens].sum())
