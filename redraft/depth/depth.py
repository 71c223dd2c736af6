"""The seam of depth: which layers the rows behind the given context run.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `layers(count)`. Rows of the context run all
layers. A skipped layer passes a row's hidden state on and stores no key for it; no later row of the text runs that layer.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from redraft.card import Card


class Depth(Protocol):
    """A registered plan of layers."""

    card: ClassVar[Card]

    def layers(self, count: int) -> frozenset[int]:
        """The layers that run, of a model that has `count`."""
        ...
