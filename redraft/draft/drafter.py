"""The seam of drafters: propose a tree for every sequence, learn from what was found.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner, sampler)`, which returns
what lives as long as the engine (itself when stateless). What lives as long as a request is what `begin` returns; it
is kept in seq.state[opened] and copied by `fork`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.noise import Stream
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import F64, I64, Kind, TokenTree


class OpenDrafter(Protocol):
    """An opened drafter. `taps`: what it wants to see of each forward; `kinds`: how it makes children. It may also have the following,
    else those of Stateless hold: `never_drafts`: it never proposes anything; `names`: what TokenTree.origins count; `bytes`: the memory
    that it holds of its own now, shared models and the state of requests not counted."""

    @property
    def taps(self) -> Taps: ...
    @property
    def kinds(self) -> frozenset[Kind]: ...

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """One tree per sequence, within its budget; budget 0 or nothing to say: an empty tree."""
        ...

    def observe(self, result: StepResult) -> None:
        """What the step found. A sequence without state of this drafter drafts no more, or never did."""
        ...

    def begin(self, seq: Sequence) -> Any:
        """State of one sequence; it may meet generated tokens, after preemption. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def snapshot(self) -> Any:
        """What was learned from traffic, so that a benchmark can restore it."""
        ...

    def restore(self, snapshot: Any) -> None: ...


class DraftRow(Protocol):
    """Logits behind the request's processors: ids i64[M], ascending, and values f64[M] of the tokens that are left."""

    @property
    def ids(self) -> I64: ...
    @property
    def values(self) -> F64: ...


class DraftVocabulary(Protocol):
    """`size` token ids, of which `eos` end a text."""

    @property
    def size(self) -> int: ...
    @property
    def eos(self) -> frozenset[int]: ...


class DraftSampler(Protocol):
    """What a drafter that samples may ask of the sampler. drafts: the noise it must draw with, the verifier's choice."""

    @property
    def vocabulary(self) -> DraftVocabulary: ...
    @property
    def drafts(self) -> Stream: ...

    def row(self, values: F64, seq: Sequence, drafted: list[int]) -> DraftRow:
        """Fresh logits f64[V] behind seq.tokens and `drafted`, as the request's processors leave them."""
        ...


class Drafter(Protocol):
    """A registered drafter: hyper-parameters only. `runner` and `sampler` (a DraftSampler) are what it may use from above. It may also
    have `max_bytes(runner)`: what an opened one may come to hold, so that a choice that is too large is refused before it is opened."""

    card: ClassVar[Card]

    def open(self, runner: Any, sampler: Any) -> OpenDrafter: ...


def max_bytes(method: Any, runner: Any) -> int:
    """What an opened `method` may come to hold, as far as it says."""
    found: int = method.max_bytes(runner) if hasattr(method, "max_bytes") else 0
    return found


class Wrapper:
    """Defaults for opened drafters made of others: forwards begin, fork, end and all that is learned to its parts."""

    def __init__(self, parts: Seq[OpenDrafter]) -> None:
        self.parts = tuple(parts)
        self.taps = NOTHING
        for part in self.parts:
            self.taps |= part.taps
        self.kinds = frozenset[Kind]().union(*(part.kinds for part in self.parts))

    @property
    def bytes(self) -> int:
        return sum(getattr(part, "bytes", 0) for part in self.parts)

    def observe(self, result: StepResult) -> None:
        for part in self.parts:
            part.observe(result)

    def begin(self, seq: Sequence) -> list[Any]:
        return self._each(seq, [part.begin for part in self.parts])

    def fork(self, state: list[Any], seq: Sequence) -> list[Any]:
        return self._each(seq, [partial(part.fork, one) for part, one in zip(self.parts, state, strict=True)])

    def end(self, state: list[Any]) -> None:
        for part, one in zip(self.parts, state, strict=False):
            part.end(one)

    def snapshot(self) -> Any:
        found = [part.snapshot() for part in self.parts]
        return None if all(one is None for one in found) else found

    def restore(self, snapshot: list[Any]) -> None:
        for part, one in zip(self.parts, snapshot, strict=True):
            if one is not None:
                part.restore(one)

    def _each(self, seq: Sequence, starts: list[Callable[[Sequence], Any]]) -> list[Any]:
        """Starts every part, or none: what began is ended where a later part raises."""
        states: list[Any] = []
        try:
            for part, start in zip(self.parts, starts, strict=True):
                states.append(start(seq))
                seq.state[part] = states[-1]  # a part finds its own state as if it stood alone
        except BaseException:
            self.end(states)
            raise
        return states


class Stateless:
    """Defaults for opened drafters that keep nothing per request and learn nothing."""

    taps: Taps = NOTHING
    kinds: frozenset[Kind] = frozenset({Kind.FIXED})
    never_drafts: ClassVar[bool] = False
    names: Seq[str] = ()

    @property
    def bytes(self) -> int:
        return 0

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
