"""The interface of drafters: propose a tree for every sequence, then learn from the result of the step.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner, sampler)`. `open` returns
the drafter that lives as long as the engine (a stateless class returns itself). `begin` returns the state of one request.
The engine keeps it in seq.state[opened], and `fork` copies it.
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
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I64, Kind, TokenTree
from redraft.errors import Unsupported

Seconds = Callable[[int, int], float | None]
"""Runs a step of so many rows after so many cached tokens and returns its seconds, None if that does not fit into the memory or context."""


class OpenDrafter(Protocol):
    """An opened drafter. `taps`: the outputs of each forward pass that it reads; `kinds`: how it makes children.

    Optional, with the defaults of Stateless: `never_drafts`: it never proposes anything; `names`: the names that TokenTree.origins
    index; `alone`: why it cannot be joined with other drafters, empty if it can; `bytes`: the memory that it holds now, without shared
    models and without the state of requests; `stopped(seq)`: the names of drafters that do not draft for this text at the moment, because
    they did not pay; `idle(seconds)`: uses a moment without requests for one timed step at most, and returns whether there is more to
    do."""

    @property
    def taps(self) -> Taps: ...
    @property
    def kinds(self) -> frozenset[Kind]: ...

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """One tree per sequence, within its budget. The tree is empty if the budget is 0 or there is nothing to propose."""
        ...

    def observe(self, result: StepResult) -> None:
        """Receives the result of the step. A sequence without a state of this drafter has stopped drafting or never drafted. A constraint
        may have changed trees: `result.own(s)` is what this drafter proposed."""
        ...

    def begin(self, seq: Sequence) -> Any:
        """The state of one sequence. After a preemption, the sequence already has generated tokens. `end` is always called later."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Any: ...

    def end(self, state: Any) -> None: ...

    def snapshot(self) -> Any:
        """What the drafter has learned from traffic. Benchmarks restore it between runs."""
        ...

    def restore(self, snapshot: Any) -> None: ...


class DraftRow(Protocol):
    """Logits after the request's processors, for the tokens that remain: ids i64[M], ascending, and values f64[M]."""

    @property
    def ids(self) -> I64: ...
    @property
    def values(self) -> F64: ...


class DraftVocabulary(Protocol):
    """size: the number of token ids; eos: the ids that end a text."""

    @property
    def size(self) -> int: ...
    @property
    def eos(self) -> frozenset[int]: ...


class DraftSampler(Protocol):
    """The part of the sampler that drafters may use. drafts: the noise stream to draw with, chosen by the verifier; exact: no tree changes
    a text, see Verifier."""

    @property
    def vocabulary(self) -> DraftVocabulary: ...
    @property
    def drafts(self) -> Stream: ...
    @property
    def exact(self) -> bool: ...

    def row(self, values: F64, seq: Sequence, drafted: list[int]) -> DraftRow:
        """Applies the request's processors to the logits after seq.tokens and `drafted`. values: f64[V], may be overwritten."""
        ...

    def few(self, ids: I64, values: F64, seq: Sequence, drafted: list[int]) -> DraftRow:
        """As `row`, of some tokens only: ids i64[M], ascending; values f64[M], may be overwritten."""
        ...


class Drafter(Protocol):
    """A registered drafter: hyper-parameters only. It may use `runner` and `sampler` (a DraftSampler).

    Optional: `max_bytes(runner)`, the most memory that an opened drafter can hold. A request that chooses a drafter that is too large
    is refused before the drafter is opened."""

    card: ClassVar[Card]

    def open(self, runner: Any, sampler: Any) -> OpenDrafter: ...


def max_bytes(method: Any, runner: Any) -> int:
    """The most bytes that an opened `method` can hold; 0 if the method does not declare it."""
    found: int = method.max_bytes(runner) if hasattr(method, "max_bytes") else 0
    return found


class Wrapper:
    """Base class of opened drafters that consist of other drafters. It forwards all calls except `propose` to its parts."""

    def __init__(self, parts: Seq[OpenDrafter]) -> None:
        self.parts = tuple(parts)
        if why := next(filter(None, (getattr(part, "alone", "") for part in self.parts)), ""):
            raise Unsupported(why)
        self.taps = NO_TAPS
        for part in self.parts:
            self.taps |= part.taps
        self.kinds = frozenset[Kind]().union(*(part.kinds for part in self.parts))

    @property
    def bytes(self) -> int:
        return sum(getattr(part, "bytes", 0) for part in self.parts)

    def observe(self, result: StepResult) -> None:
        for part in self.parts:
            part.observe(result)

    def stopped(self, seq: Sequence) -> Seq[str]:
        return [name for part in self.parts if hasattr(part, "stopped") for name in part.stopped(seq)]

    def idle(self, seconds: Seconds) -> bool:
        return any(part.idle(seconds) for part in self.parts if hasattr(part, "idle"))

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
        """Starts every part. If a part raises, the parts that have started are ended."""
        states: list[Any] = []
        try:
            for part, start in zip(self.parts, starts, strict=True):
                states.append(start(seq))
                seq.state[part] = states[-1]  # a part looks up its own state
        except BaseException:
            self.end(states)
            raise
        return states


class Stateless:
    """Default members of opened drafters that keep no state per request and learn nothing."""

    taps: Taps = NO_TAPS
    kinds: frozenset[Kind] = frozenset({Kind.FIXED})
    never_drafts: ClassVar[bool] = False
    names: Seq[str] = ()
    alone: ClassVar[str] = ""

    @property
    def bytes(self) -> int:
        return 0

    def observe(self, result: StepResult) -> None:
        pass

    def stopped(self, seq: Sequence) -> Seq[str]:
        return ()

    def idle(self, seconds: Seconds) -> bool:
        return False

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
