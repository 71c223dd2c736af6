"""Which layers of a model rows run, their attention and their MLP apart, and what changes hidden states between layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Layers(NamedTuple):
    """The layers whose attention runs and those whose MLP runs. A half that does not run passes hidden states on unchanged; without the
    attention half no key is stored."""

    attention: frozenset[int]
    mlp: frozenset[int]

    @classmethod
    def whole(cls, layers: Iterable[int]) -> Layers:
        """Both halves of these layers."""
        both = frozenset(layers)
        return cls(both, both)

    def within(self, other: Layers | None) -> Layers:
        """The halves that are in both; None: all."""
        return self if other is None else Layers(self.attention & other.attention, self.mlp & other.mlp)


class Between(Protocol):
    """Changes the hidden states of one text before the layers `cuts`."""

    @property
    def cuts(self) -> frozenset[int]: ...

    def act(self, layer: int, h: Any, positions: NDArray[np.int32]) -> Any:
        """h [n, hidden], the states of the text's rows in this step, at `positions` i32[n] -> [n, hidden]."""
        ...
