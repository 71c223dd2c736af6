"""Methods that break their guarantee, record or guess badly, and a tiny checkpoint with a tokenizer, for the tests of `compare`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
import transformers

from redraft.card import Card, Guarantee
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted, Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import Stateless
from tests.models import tiny


def checkpoint(folder: Path) -> Path:
    """A random Llama whose tokens are the words w3 to w60."""
    tiny.save("llama2", folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.V)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return folder


def card(title: str) -> Card:
    return Card(title, "nobody, nothing, 2025", Guarantee.SAME_TEXT)


@dataclass
class Spy(Stateless):
    """Learns the prompts that it has observed. `log`: (own prompt, what was known) whenever a sequence begins."""

    known: frozenset[tuple[int, ...]] = frozenset()
    log: list[tuple[tuple[int, ...], frozenset[tuple[int, ...]]]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def begin(self, seq: Sequence) -> None:
        self.log.append((tuple(seq.request.prompt), self.known))

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [EMPTY for _ in seqs]

    def observe(self, result: StepResult) -> None:
        self.known |= {tuple(work.seq.request.prompt) for work in result.work}

    def snapshot(self) -> Any:
        return self.known

    def restore(self, snapshot: Any) -> None:
        self.known = snapshot


@dataclass(frozen=True)
class Spying:
    card: ClassVar[Card] = card("Spy")

    def open(self, runner: Any, sampler: Any) -> Spy:
        return Spy()


@dataclass(frozen=True)
class Guess(Stateless):
    """Always proposes the same two tokens."""

    card: ClassVar[Card] = card("Guess")

    def open(self, runner: Any, sampler: Any) -> Guess:
        return self

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [TokenTree.chain([7, 9][: min(budget)]) for budget in budgets]


@dataclass(frozen=True)
class Gullible:
    """Accepts every draft, whatever the target says. Right without drafts."""

    card: ClassVar[Card] = card("Gullible")
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    exact = False
    drafts: ClassVar[Stream] = Stream.TARGET

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        found = []
        for root, tree in zip(distribution.roots.tolist(), trees):
            if root < 0:
                found.append(Accepted())
                continue
            path = tuple(range(len(tree)))
            found.append(Accepted(path, (*tree.tokens.tolist(), *distribution.draw([root + len(path)]))))
        return found
