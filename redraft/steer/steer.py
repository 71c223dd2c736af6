"""The interface of steering (seam "steer"): changes of hidden states between layers.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. What happens to a row is a function of
its state and its position. So a text does not depend on drafts, chunks and batches.
The prefix cache holds only rows that no method changed, so a steered text shares its context with others.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.layers import Between


class OpenSteer(Protocol):
    def between(self, context: int) -> Between | None:
        """What acts on a text whose first `context` tokens count as given; None if nothing does."""
        ...

    def shareable_tokens(self, context: int) -> int:
        """How many leading tokens have the keys of a run without this method."""
        ...


class Steer(Protocol):
    """A registered steering method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenSteer: ...
