"""The seam of cache policies that evict: what rows see, when something goes, and what.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, which returns what lives as
long as the engine (itself when stateless). What lives as long as a request is what `begin` returns; it is kept in
seq.state[opened] and copied by `fork`.

All that happens is keyed to seq.stored, the count of committed tokens, so that no result depends on how tokens were grouped
into steps: no step crosses a sync point, statistics are those of committed rows in their order, and what rows see at other times
is a mask that depends on their own position.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.sequence import NEVER, Lanes, Sequence
from redraft.core.tree import I32
from redraft.core.view import Watch, Window
from redraft.ops.backend import Seen


class OpenKeep(Protocol):
    """An opened policy. lanes: SHARED where all heads hold the same slots; endless: positions may pass the trained context;
    window: what rows see, for policies that are a mask; max_slots: committed slots that a lane holds at any time, at most;
    shareable_tokens: leading tokens whose keys are those of a run without the policy."""

    lanes: Lanes
    endless: bool
    window: Window | None
    max_slots: int
    shareable_tokens: int

    def begin(self, seq: Sequence) -> Any:
        """State of one sequence; it may meet generated tokens, after preemption. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def sync_point(self, seq: Sequence) -> int:
        """The next value of seq.stored, above the present one, that no step may cross; NEVER for none."""
        ...

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        """Statistics wanted of the attention of this step; always the same number of them."""
        ...

    def observe(self, seq: Sequence, seen: Seen | None, rows: int, path: Seq[int]) -> None:
        """After a commit of `rows` chain rows and the nodes `path` (numbers of tree rows, in order): statistics become real. seen:
        None where nothing was watched. seq.stored has advanced."""
        ...

    def decide(self, seq: Sequence, positions: Callable[[], list[I32]]) -> list[I32] | None:
        """After each commit, and again at the same count: the slots to keep of each lane, ascending, where something goes; None
        where nothing does. positions(): of the committed slots of each lane, ascending. State parallel to slots must follow what
        is returned."""
        ...


class Keep(Protocol):
    """A registered policy: hyper-parameters only. `runner` tells of the model and its backend."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenKeep: ...


class Stateless:
    """Defaults for policies that keep nothing per request and watch nothing."""

    lanes: Lanes = Lanes.SHARED
    endless: bool = False
    window: Window | None = None
    max_slots: int = NEVER
    shareable_tokens: int = NEVER

    def begin(self, seq: Sequence) -> Any:
        return None

    def fork(self, state: Any, seq: Sequence) -> Any:
        return None

    def end(self, state: Any) -> None:
        pass

    def sync_point(self, seq: Sequence) -> int:
        return NEVER

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        return ()

    def observe(self, seq: Sequence, seen: Seen | None, rows: int, path: Seq[int]) -> None:
        pass
