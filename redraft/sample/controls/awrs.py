"""Follows any constraint that can be asked about: tokens are drawn, and those that the constraint refuses are drawn again, without them.

Benjamin Lipkin, Benjamin LeBrun, Jacob Hoover Vigly, Joao Loula, David R. MacIver, Li Du, Jason Eisner, Ryan Cotterell, Vikash Mansinghka,
Timothy J. O'Donnell, Alexander K. Lew, Tim Vieira: Fast Controlled Generation from Language Models with Adaptive Weighted Rejection
Sampling, 2025, arXiv 2504.05410.

1. Tokens are visited by falling logit plus Gumbel noise, the order of draws without replacement.
2. The first token is taken with which the text may go on, or at which it may end.

So it is the token that a mask over the whole vocabulary would give, with as many questions as tokens are refused, and one more.

Differs: the unweighted form; there are no importance weights and no particles. The filters of the request act before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.options import Options
from redraft.sample.controls.control import Stage
from redraft.sample.controls.json_text import may_be_json
from redraft.sample.processors.processor import Path, Vocabulary

Predicate = Callable[[str, bool], bool]
NAMED: dict[str, Predicate] = {"json": may_be_json}


@dataclass(frozen=True)
class AWRS(Options):
    """predicate: json, or in Python a function of the new text and of whether it ends there: may it go on, or may it end? It is
    called once for each token in question. A character of which bytes are missing is U+FFFD: a predicate that refuses it gets none that
    takes several tokens."""

    predicate: str | Predicate = "json"

    card: ClassVar[Card] = Card(
        "Adaptive weighted rejection sampling",
        "Lipkin, LeBrun, Vigly, Loula, MacIver, Du, Eisner, et al., Fast Controlled Generation from Language Models with Adaptive "
        "Weighted Rejection Sampling, 2025, arXiv 2504.05410",
        Guarantee.LOSSY,
        needs="a constraint that can say whether a text may go on",
        deviates="the unweighted form, without importance weights and particles; filters act before",
        summary="Exact sampling under a predicate; for rules in Python",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.predicate, str) and self.predicate not in NAMED:
            raise registry.unknown("predicate", self.predicate, NAMED)

    def open(self, vocabulary: Vocabulary) -> Asked:
        if vocabulary.bytes_of is None:
            raise InvalidInput("awrs: needs a model with a tokenizer")
        return Asked(NAMED[self.predicate] if isinstance(self.predicate, str) else self.predicate, vocabulary, vocabulary.bytes_of)


@dataclass(frozen=True, eq=False)
class Asked:
    predicate: Predicate
    vocabulary: Vocabulary
    bytes_of: Callable[[int], bytes]
    stage: ClassVar[Stage] = Stage.CHECK

    def begin(self, seq: Sequence) -> Asking:
        ends = frozenset(seq.params.stop_token_ids) | (frozenset() if seq.params.ignore_eos else self.vocabulary.eos)
        return Asking(self, ends, Path(lambda seq: b"", lambda text, token: text + self.bytes_of(token)))


@dataclass(frozen=True, eq=False)
class Asking:
    """ends: tokens that end the text; text: the bytes of the new tokens."""

    asked: Asked
    ends: frozenset[int]
    text: Path[bytes]

    def accepts(self, seq: Sequence, drafted: list[int], token: int) -> bool:
        text, ended = self.text.at(seq, drafted), token in self.ends
        if not ended:
            if token in self.asked.vocabulary.special:
                return False  # it is no text
            text += self.asked.bytes_of(token)
        return bool(self.asked.predicate(text.decode(errors="replace"), ended))
