"""The interface of sparse attention methods: the cache keeps all keys, and each new row reads some of them.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, which returns a Select (ops/backend.py)
with a name and limits. Rows of the given context read all keys, unless the method begins `inside` it. For each later row `select` chooses
among the keys that the row sees, by its own query and position, so no choice depends on chunks, drafts or other texts.

A method whose choice needs more of a text than its side data has a state of the text. It is made of committed tokens and their stored
keys at borders, which are multiples of `sync_every`, so it is the same after a preemption and in another engine. A method that `watches`
also has statistics of the attention weights of committed rows; its texts are computed again in another engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.core.view import Far, Watch
from redraft.kv.slots import Held
from redraft.ops.arrays import Tensor
from redraft.ops.backend import Products, Select, WeightSums
from redraft.ops.format import Array, Arrays


class OpenSparseAttention(Select, Protocol):
    """name: the name of its side data, different for different side data; dense_up_to: a row that sees at most this many slots reads all of
    them; sync_every: the number of committed tokens, a multiple of 32, between sync points at which the per-page arrays of full pages are
    filled and `border` acts, 0 for a method without both; own: whether a text has a state of its own; inside: the position from which
    rows of the context select too, UNLIMITED for none; far: the distance of far keys, for all rows, None for the true one; watches:
    whether the state follows attention weights; skippable: the number of leading tokens whose rows need not be watched."""

    name: str
    dense_up_to: int
    sync_every: int
    own: bool
    inside: int
    far: Far | None
    watches: bool
    skippable: int

    def begin(self, seq: Sequence) -> Select:
        """The state of a text, with which its rows select. It is kept in seq.state. Always paired with `end`."""
        ...

    def fork(self, state: Any, seq: Sequence) -> Select: ...

    def end(self, state: Any) -> None: ...

    def border(self, state: Any, seq: Sequence, held: Held, edited: bool) -> None:
        """Called after each commit behind the first position that selects, and possibly again at the same seq.stored. The state must become
        what the tokens up to the last multiple of `sync_every` and the slots in the cache give. edited: slots were evicted since the last
        call."""
        ...

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        """As evictions have it, and so `observe`, which is called before `border`."""
        ...

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None: ...


class StatelessRead:
    """Defaults for methods that select by side data only, behind the context and at true distances."""

    own: bool = False
    inside: int = UNLIMITED
    far: Far | None = None
    watches: bool = False
    skippable: int = UNLIMITED

    def begin(self, seq: Sequence) -> Any:
        return self

    def fork(self, state: Any, seq: Sequence) -> Any:
        return self

    def end(self, state: Any) -> None:
        pass

    def border(self, state: Any, seq: Sequence, held: Held, edited: bool) -> None:
        pass

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        return ()

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        pass


class NoSideData:
    """Defaults of Select for what stores nothing beside keys."""

    def arrays(self, head_dim: int, dtype: Any) -> dict[str, Array]:
        return {}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        return {}

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        return {}


class StatefulRead(NoSideData, StatelessRead):
    """Defaults for methods that select with a state of the text, which `begin` returns, and store nothing beside keys."""

    own = True

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        raise AssertionError("a text reads with its own state")


class Read(Protocol):
    """A registered sparse attention method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenSparseAttention: ...
