"""The seam of depth: which layers the rows behind the given context run.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. Rows of the context run all
layers. A skipped layer passes a row's hidden state on and stores no key for it; no later row of the text runs that layer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from redraft.card import Card


class OpenLayerSkipping(Protocol):
    def layers(self, count: int) -> frozenset[int]:
        """The layers that run, of a model that has `count`."""
        ...


class LayerSkipping(Protocol):
    """A registered plan of layers: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenLayerSkipping: ...
