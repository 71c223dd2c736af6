"""The seam of drafters: propose a tree for every sequence, learn from what was found.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner, sampler)`, which returns
what lives as long as the engine (itself when stateless). What lives as long as a request is what `begin` returns; it
is kept in seq.state[opened] and copied by `fork`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import Kind, TokenTree


class OpenDrafter(Protocol):
    """An opened drafter. `taps`: what it wants to see of each forward; `kinds`: how it makes children."""

    @property
    def taps(self) -> Taps: ...
    @property
    def kinds(self) -> frozenset[Kind]: ...

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """One tree per sequence, within its budget; budget 0 or nothing to say: an empty tree."""
        ...

    def observe(self, result: StepResult) -> None: ...

    def begin(self, seq: Sequence) -> Any:
        """State of one sequence; it may meet generated tokens, after preemption. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def snapshot(self) -> Any:
        """What was learned from traffic, so that a benchmark can restore it."""
        ...

    def restore(self, snapshot: Any) -> None: ...


class Drafter(Protocol):
    """A registered drafter: hyper-parameters only. `runner` and `sampler` are what a drafter may use from above."""

    card: ClassVar[Card]

    def open(self, runner: Any, sampler: Any) -> OpenDrafter: ...


class Stateless:
    """Defaults for opened drafters that keep nothing per request and learn nothing."""

    taps: Taps = NOTHING
    kinds: frozenset[Kind] = frozenset({Kind.FIXED})

    def observe(self, result: StepResult) -> None:
        pass

    def begin(self, seq: Sequence) -> Any:
        return None

    def fork(self, state: Any, seq: Sequence) -> Any:
        return self.begin(seq)

    def end(self, state: Any) -> None:
        pass

    def snapshot(self) -> Any:
        return None

    def restore(self, snapshot: Any) -> None:
        pass
