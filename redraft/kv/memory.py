"""The protocol of sequence memories, and a combination of several memories.

A step calls `reserve` (adds tentative rows), then `commit` (bookkeeping only), then `move` (tensors). All figures are in blocks, so
that a scheduler can add them up. A memory that counts in other amounts converts them to blocks and rounds to its own disadvantage.
One memory leads: only it changes `seq.stored` and `seq.tokens`. The others read them, so they open after it and commit before it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from redraft.core.batch import PageView, StateView
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Sequence, Space
from redraft.core.tree import I32, TokenTree
from redraft.kv.parcel import Read

if TYPE_CHECKING:
    from redraft.kv.paged import Paged
    from redraft.ops.format import Arrays

View = TypeVar("View", covariant=True)


class Memory(Protocol[View]):
    """The memory of the model's layers `layers`. pool: the tensors that their mixers read and write, in which layer layers[i] has
    index i. blocks: the total number of blocks. formats: names of page formats that belong to this memory only."""

    layers: tuple[int, ...]
    blocks: int
    formats: frozenset[str]

    @property
    def pool(self) -> Any: ...

    # ---- figures in blocks

    def available(self) -> int:
        """Blocks that reserve() can take."""
        ...

    def used(self) -> int:
        """Blocks that open sequences hold."""
        ...

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int:
        """Blocks for `rows` more rows of an open sequence, or for the first `rows` tokens of a sequence that is not open and will
        attach `matched` of them. An upper bound; the sum over sequences is one too."""
        ...

    def gain(self, seq: Sequence) -> int:
        """Blocks that free(seq) adds to available(); a lower bound."""
        ...

    def idle_matched(self, tokens: Seq[int], salt: str) -> int:
        """Blocks counted by available() that attaching the match of `tokens` takes."""
        ...

    # ---- prefixes

    def match(self, tokens: Seq[int], salt: str) -> int:
        """The number of leading tokens that attach() can reuse, at most len(tokens) - 1. Changes nothing."""
        ...

    def attach(self, seq: Sequence, n: int) -> None:
        """Reuses the first `n` tokens. n is at most the match, and a length at which a shorter match may end."""
        ...

    def publish(self, seq: Sequence) -> None:
        """Offers committed tokens to later matches."""
        ...

    # ---- sequences

    def open(self, seq: Sequence) -> None: ...

    def fork(self, seq: Sequence, child: Sequence) -> None:
        """Opens `child` with the committed state of `seq`. The tail must be empty. After an error `child` is not open."""
        ...

    def free(self, seq: Sequence) -> None:
        """Closes an open sequence and releases its memory."""
        ...

    # ---- rows

    def reserve(self, work: Seq[Work], trees: Seq[TokenTree]) -> View:
        """Extends the tail of each sequence by the rows that the next forward pass runs. May be called again before commit, with
        w.first = the number of nodes in the tail. Raises OutOfPages if need() was not respected; tails must then be discarded."""
        ...

    def commit(self, work: Seq[Work], accepted: Seq[Accepted]) -> Any:
        """Keeps the chain and the accepted path and drops the rest of the tail. Returns the argument of move()."""
        ...

    def move(self, moves: Any) -> None:
        """The second half of a commit: moves the tensors."""
        ...

    def discard(self, seq: Sequence) -> None:
        """Drops the tail, if there is one."""
        ...

    # ---- between engines

    def export(self, seq: Sequence) -> Any:
        """Where the committed state of an open sequence lies: numbers only, valid until the sequence changes. The tail must be empty."""
        ...

    def read(self, space: Space, pages: I32) -> Arrays:
        """Copies of these pages, name -> [pages, *shape]. Any thread may read pages that an exported sequence holds."""
        ...

    def import_(self, seq: Sequence, stored: Any, attached: int, read: Read) -> None:
        """Opens `seq` with an exported state: the first `attached` tokens from the prefixes of this memory, see attach(), the rest with
        read() of the other memory. If it raises, `seq` is not open: OutOfPages if it does not fit, OSError if the copy failed."""
        ...

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        ...


class Memories:
    """The pages, which lead, and further memories combined. A prefix matches as far as all memories agree. The scarcest memory sets
    every figure."""

    def __init__(self, paged: Paged, *others: Memory[StateView]) -> None:
        self.paged, self.others = paged, others
        self.members: tuple[Memory[Any], ...] = (paged, *others)
        self.blocks = min(memory.blocks for memory in self.members)

    @property
    def pool(self) -> Any:
        """The pool of the pages, over which backends run segments of layers."""
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

    def read(self, space: Space, pages: I32) -> Arrays:
        return next((memory for memory in self.others if space.format in memory.formats), self.paged).read(space, pages)

    def import_(self, seq: Sequence, stored: list[Any], attached: int, read: Read) -> None:
        self._open(seq, [partial(memory.import_, seq, own, attached, read) for memory, own in zip(self.members, stored, strict=True)])

    def _open(self, seq: Sequence, opens: Seq[Callable[[], None]]) -> None:
        """Opens `seq` in all memories, or in none if one raises."""
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
