"""The interface of layer skipping (seam "depth"): which layers the rows after the prompt run.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. Rows of the prompt run all
layers. A skipped layer passes a row's hidden state on and stores no key for it. No later row of the text runs that layer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from redraft.card import Card


class OpenLayerSkipping(Protocol):
    def layers(self, count: int) -> frozenset[int]:
        """The layers that run, of a model with `count` layers."""
        ...


class LayerSkipping(Protocol):
    """A registered layer-skipping method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenLayerSkipping: ...
