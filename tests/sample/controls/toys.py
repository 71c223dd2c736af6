"""Controls of the tests, one for each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.sample.controls.control import Stage


@dataclass(frozen=True)
class Toy:
    """LOGITS: the token after an equal token gets a bonus. FILTERED: keeps every other token that is left. CHECK: refuses tokens with the
    remainder of the text's length by 3."""

    stage: Stage
    fails: bool = False
    card: ClassVar[Card] = Card("A toy", "none", Guarantee.LOSSY)

    def open(self, vocabulary: Any) -> Toy:
        return self

    def begin(self, seq: Any) -> Toy:
        return self

    def apply(self, row: Any) -> None:
        if self.fails and row.generated > 3:
            raise KeyError("a fault")
        if self.stage is Stage.LOGITS:
            tokens = row.seq.tokens + row.drafted
            row.values[tokens[-1]] += 3.0
        else:
            row.keep(range(0, len(row.ids), 2))

    def accepts(self, seq: Any, drafted: list[int], token: int) -> bool:
        if self.fails and seq.generated + len(drafted) > 3:
            raise KeyError("a fault")
        return token % 3 != (len(seq.tokens) + len(drafted)) % 3


TOYS = [Toy(stage) for stage in Stage]
