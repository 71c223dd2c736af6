"""What a sequence remembers of its text: the protocol of memories, and several of them as one.

A step calls `reserve` (rows become tentative), then `commit` (bookkeeping only), then `move` (tensors). Figures are in blocks, so
that a scheduler can add them up: a memory that counts in units of its own states them in blocks, rounded against itself. One
memory leads: it alone changes `seq.stored` and `seq.tokens`. The others read them, so they open after it and commit before it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from redraft.core.batch import PageView, StateView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree

if TYPE_CHECKING:
    from redraft.kv.paged import Paged

View = TypeVar("View", covariant=True)


class Memory(Protocol[View]):
    """The memory of the model's layers `layers`. pool: what their mixers read and write; layer layers[i] is number i in it. blocks: all
    of its blocks."""

    layers: tuple[int, ...]
    blocks: int

    @property
    def pool(self) -> Any: ...

    # ---- figures, in blocks

    def available(self) -> int:
        """Blocks that reserve can take."""
        ...

    def used(self) -> int:
        """Blocks that open sequences hold."""
        ...

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        """Blocks for `rows` more rows of an open sequence, or for the first `rows` tokens of one that is not open and will attach
        `matched` of them. An upper bound, also as a sum over sequences."""
        ...

    def gain(self, seq: Sequence) -> int:
        """Blocks that free(seq) adds to available(), or fewer."""
        ...

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        """Blocks that available() counts and that attaching the match of `tokens` takes."""
        ...

    # ---- prefixes

    def match(self, tokens: Seq[int], salt: str) -> int:
        """How many leading tokens attach() can take over, at most len(tokens) - 1. Changes nothing."""
        ...

    def attach(self, seq: Sequence, n: int) -> None:
        """Takes over the first `n` tokens; n is no more than the match, and a number at which a shorter match may end."""
        ...

    def publish(self, seq: Sequence) -> None:
        """Offers committed tokens to later matches."""
        ...

    # ---- sequences

    def open(self, seq: Sequence) -> None: ...

    def fork(self, seq: Sequence, child: Sequence) -> None:
        """Opens `child` with all that `seq` has committed. The tail must be empty. `child` is not open after an error."""
        ...

    def free(self, seq: Sequence) -> None:
        """Forgets an open sequence."""
        ...

    # ---- rows

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> View:
        """Places for the rows that a forward pass is about to run; they extend each sequence's tail. May be called again before
        commit, with w.first = the nodes that the tail has. OutOfPages, after which tails must be discarded, where need() was
        not respected."""
        ...

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> Any:
        """The chain and the accepted path are kept, the rest of the tail is gone. Returns what move() must be given."""
        ...

    def move(self, moves: Any) -> None:
        """The second half of a commit: moves tensors."""
        ...

    def discard(self, seq: Sequence) -> None:
        """Drops the tail, if there is one."""
        ...

    # ---- between engines

    def export(self, seq: Sequence) -> Any:
        """A copy of what an open sequence has committed, for import_ into the memory of another engine with the same model."""
        ...

    def import_(self, seq: Sequence, parcel: Any) -> None:
        """Opens `seq` with what was exported. OutOfPages, and nothing is open, where it does not fit."""
        ...

    def check(self) -> None:
        """AssertionError where an invariant broke."""
        ...


class Memories:
    """The pages, which lead, and further memories as one. A prefix matches as far as all agree; what is scarcest decides."""

    def __init__(self, paged: Paged, *others: Memory[StateView]) -> None:
        self.paged, self.others = paged, others
        self.members: tuple[Memory[Any], ...] = (paged, *others)
        self.blocks = min(memory.blocks for memory in self.members)

    @property
    def pool(self) -> Any:
        """The pages' pool, which backends run segments of layers over."""
        return self.paged.pool

    def available(self) -> int:
        return min(memory.available() for memory in self.members)

    def used(self) -> int:
        return max(memory.used() for memory in self.members)

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        return max(memory.need(seq, rows, matched) for memory in self.members)

    def gain(self, seq: Sequence) -> int:
        return min(memory.gain(seq) for memory in self.members)

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        common = tokens[: self.match(tokens, salt) + 1]
        return max(memory.idle_matched(common, salt) for memory in self.members)

    def match(self, tokens: Seq[int], salt: str) -> int:
        n, before = max(0, len(tokens) - 1), -1
        while n != before:
            before, n = n, min(memory.match(tokens[: n + 1], salt) for memory in self.members)
        return n

    def attach(self, seq: Sequence, n: int) -> None:
        for memory in self.members:
            memory.attach(seq, n)

    def publish(self, seq: Sequence) -> None:
        for memory in self.members:
            memory.publish(seq)

    def open(self, seq: Sequence) -> None:
        for memory in self.members:
            memory.open(seq)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        self._open(child, [partial(memory.fork, seq, child) for memory in self.members])

    def free(self, seq: Sequence) -> None:
        for memory in self.members:
            memory.free(seq)

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> PageView:
        return replace(self.paged.reserve(work, trees), states=tuple(memory.reserve(work, trees) for memory in self.others))

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> list[Any]:
        others = [memory.commit(work, accepted) for memory in self.others]
        return [self.paged.commit(work, accepted), *others]

    def move(self, moves: list[Any]) -> None:
        for memory, own in zip(self.members, moves, strict=True):
            memory.move(own)

    def discard(self, seq: Sequence) -> None:
        for memory in self.members:
            memory.discard(seq)

    def export(self, seq: Sequence) -> list[Any]:
        return [memory.export(seq) for memory in self.members]

    def import_(self, seq: Sequence, parcel: list[Any]) -> None:
        self._open(seq, [partial(memory.import_, seq, own) for memory, own in zip(self.members, parcel, strict=True)])

    def _open(self, seq: Sequence, opens: Seq[Callable[[], None]]) -> None:
        """All of them, or none."""
        for i, open_one in enumerate(opens):
            try:
                open_one()
            except BaseException:
                for memory in self.members[:i]:
                    memory.free(seq)
                raise

    def check(self) -> None:
        for memory in self.members:
            memory.check()
