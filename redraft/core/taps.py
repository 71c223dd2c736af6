"""Requests for intermediate results of a forward pass. Backends return what is requested; there are no hooks. Without a request
there is no cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from redraft.core.view import Watch


@dataclass(frozen=True)
class Taps:
    """What a forward pass returns besides the argmax of every logit row. Taps are joined with `|`.

    hidden: the layers to return output hidden states of; top_k: return the ids of the k largest logits of each logit row, best
    first; logits: return the logits themselves; attention: the statistics of attention weights to return, by index of the sequence
    in the batch.
    """

    hidden: frozenset[int] = frozenset()
    top_k: int = 0
    logits: bool = False
    attention: Mapping[int, tuple[Watch, ...]] = field(default_factory=dict)

    def __or__(self, other: Taps) -> Taps:
        if other is NO_TAPS or self is NO_TAPS:
            return self if other is NO_TAPS else other
        both = {s: self.attention.get(s, ()) + other.attention.get(s, ()) for s in {*self.attention, *other.attention}}
        return Taps(self.hidden | other.hidden, max(self.top_k, other.top_k), self.logits or other.logits, both)


NO_TAPS = Taps()
