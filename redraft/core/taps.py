"""What a part wants to see of a forward pass: asked for, never hooked. Costs nothing when nobody asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from redraft.core.view import Watch


@dataclass(frozen=True)
class Taps:
    """The head gives an argmax for every logit row; all else is asked for here. Taps are joined with `|`.

    hidden: layers whose output hidden states are wanted; top_k: ids of the k largest logits, best first, per logit row;
    logits: the rows of logits themselves; attention: statistics of attention weights by place of the sequence in the batch.
    """

    hidden: frozenset[int] = frozenset()
    top_k: int = 0
    logits: bool = False
    attention: Mapping[int, tuple[Watch, ...]] = field(default_factory=dict)

    def __or__(self, other: Taps) -> Taps:
        both = {s: self.attention.get(s, ()) + other.attention.get(s, ()) for s in {*self.attention, *other.attention}}
        return Taps(self.hidden | other.hidden, max(self.top_k, other.top_k), self.logits or other.logits, both)


NOTHING = Taps()
