"""The interface of layer skipping (seam "depth"): which layers the rows after the context run.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. Rows of the context run all layers.
Behind it the layers change at borders only: values of seq.stored that no step crosses, so all rows of a step run the same ones. A
skipped layer passes a row's hidden state on and stores no key for it. A later row lacks that key, so a set never grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.layers import Layers
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.ops.arrays import Tensor


class OpenLayerSkipping(Protocol):
    """An opened method. skips: whether it may leave out a layer at all; taps: the hidden states of the context's rows that `observe`
    reads. With taps, every row of the context runs, and none comes from the prefix cache."""

    skips: bool
    taps: Taps

    def begin(self, seq: Sequence) -> Any:
        """The state of one sequence. After a preemption the sequence already has generated tokens. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def observe(self, seq: Sequence, hidden: Mapping[int, Tensor]) -> None:
        """Receives the states [rows, hidden] of the context's rows in this step after each tapped layer. seq.stored has advanced."""
        ...

    def border(self, seq: Sequence) -> int:
        """The next value of seq.stored, above the current one, at which `plan` must be asked again; UNLIMITED for none. Called from the
        end of the context on."""
        ...

    def plan(self, seq: Sequence) -> Layers:
        """The layers that rows run from seq.stored to the next border. Called from the end of the context on, possibly again at the same
        seq.stored."""
        ...


class LayerSkipping(Protocol):
    """A registered layer-skipping method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenLayerSkipping: ...


class StatelessLayerSkipping:
    """Defaults for methods whose layers follow from seq.stored alone."""

    skips: bool = True
    taps: Taps = NO_TAPS

    def begin(self, seq: Sequence) -> Any:
        return None

    def fork(self, state: Any, seq: Sequence) -> Any:
        return None

    def end(self, state: Any) -> None:
        pass

    def observe(self, seq: Sequence, hidden: Mapping[int, Tensor]) -> None:
        pass

    def border(self, seq: Sequence) -> int:
        return UNLIMITED


class SameLayers(StatelessLayerSkipping):
    """The same layers for all rows behind the context. kept: of `count` layers."""

    def __init__(self, kept: Iterable[int], count: int) -> None:
        self.layers = Layers.whole(kept)
        self.skips = len(self.layers.attention) < count

    def plan(self, seq: Sequence) -> Layers:
        return self.layers
