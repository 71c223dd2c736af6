"""What a part wants to see of a forward pass: asked for, never hooked. Costs nothing when nobody asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Taps:
    """The head gives an argmax for every logit row; all else is asked for here. Taps are joined with `|`.

    hidden: layers whose output hidden states are wanted; top_k: ids of the k largest logits, best first, per logit row;
    logits: the rows of logits themselves.
    """

    hidden: frozenset[int] = frozenset()
    top_k: int = 0
    logits: bool = False

    def __or__(self, other: Taps) -> Taps:
        return Taps(self.hidden | other.hidden, max(self.top_k, other.top_k), self.logits or other.logits)


NOTHING = Taps()
