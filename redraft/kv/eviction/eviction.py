"""The interface of eviction policies: they decide which slots are evicted and when, and which slots rows see.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. open() returns an object that lives as
long as the engine (the class's own instance if it has no state). `begin` returns the state of a request; it is kept in
seq.state[opened] and copied by `fork`.

With a codec that encodes what a policy does not keep, slots are demoted instead of evicted. The policy sees the others only, in the
same way, so it need not know.

All decisions depend on seq.stored, the number of committed tokens. Results therefore do not depend on how tokens were grouped into
steps: no step crosses a sync point, statistics are those of committed rows in order, and a mask depends only on a row's position.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.sequence import NEVER, UNLIMITED, Lanes, Onset, Sequence
from redraft.core.view import Watch, Window
from redraft.kv.slots import Held, Kept
from redraft.ops.backend import WeightSums


class OpenEviction(Protocol):
    """An opened policy. lanes: SHARED if all heads keep the same slots, PER_LAYER if those of a layer do; endless: positions may exceed
    the trained context; window: the mask of rows, for policies that use one; merges: whether it writes kept slots; once: whether it
    evicts one time only."""

    lanes: Lanes
    endless: bool
    window: Window | None
    merges: bool
    once: bool

    def onset(self, context: int) -> Onset:
        """When it begins to act on a text of which `context` tokens are given."""
        ...

    def begin(self, seq: Sequence) -> Any:
        """The state of one sequence. After a preemption the sequence may already hold generated tokens. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def sync_point(self, seq: Sequence) -> int:
        """The next value of seq.stored, above the current one, that no step may cross; UNLIMITED for none."""
        ...

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        """The requested statistics of attention in this step; always the same number of them."""
        ...

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        """Adds the statistics of a commit of `rows` chain rows and the nodes `path` (indices of tree rows, in order). seen: None if
        nothing was watched. seq.stored has already advanced."""
        ...

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        """What each lane keeps, or None to evict nothing. Called after each commit, and possibly again at the same seq.stored. A state with
        one entry for each slot must follow the returned slots."""
        ...


class Keep(Protocol):
    """A registered policy: hyper-parameters only. `runner` has the model and its backend."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenEviction: ...


class StatelessEviction:
    """Defaults for policies without state per request and without statistics."""

    lanes: Lanes = Lanes.SHARED
    endless: bool = False
    window: Window | None = None
    merges: bool = False
    once: bool = False

    def onset(self, context: int) -> Onset:
        return NEVER

    def begin(self, seq: Sequence) -> Any:
        return None

    def fork(self, state: Any, seq: Sequence) -> Any:
        return None

    def end(self, state: Any) -> None:
        pass

    def sync_point(self, seq: Sequence) -> int:
        return UNLIMITED

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        return ()

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        pass
