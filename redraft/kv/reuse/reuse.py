"""The interface of reuse methods: they choose which parts of a new text come from the cache of other texts, and which of these run again.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, which raises Unsupported for models
that the method does not fit. The opened method has `spans` and `repair`. Spans are attached as private copies with keys rotated to
their new positions. The text between spans is computed with all text before it as context. When the last span is attached, `repair`
begins: it may let rows run again in place, at once or when later rows have run, and see the attention of rows. From the first span that
is not exact on, pages are not shared.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from numpy.typing import NDArray

from redraft.card import Card
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import F32, I32
from redraft.core.view import Watch


class Span(NamedTuple):
    """`length` tokens of the new text from position `at` on equal those of the text `source` from `first` on. exact: the tokens before
    them are equal too, so reuse is exact. again: positions of the new text in this span, for the method's `repair`."""

    at: int
    first: int
    length: int
    exact: bool
    source: Seq[int]
    again: Seq[int] = ()


class Taken(NamedTuple):
    """A span, and the open sequence that holds its source in the cache."""

    span: Span
    source: Sequence


class Spliced(NamedTuple):
    """A text whose spans are attached. rows: i32[n], the committed rows whose keys may differ from computed ones, ascending: from the first
    span that is not exact to the end of the last span, empty if all are exact; layers: of the model; read(layer): keys and values
    f32[K, n, D] of these rows, keys rotated by their positions; request, spans: whose text it is, and what is attached; found: the tokens
    that the prefix cache had."""

    rows: I32
    layers: int
    read: Callable[[int], tuple[F32, F32]]
    request: Request
    spans: Seq[Span] = ()
    found: int = 0


class Pass(NamedTuple):
    """Rows that run again, ascending, through the first `layers` layers, None for all. watch: statistics of their attention that `repair`
    is sent afterwards, each a Watch with `each`."""

    rows: I32
    layers: int | None = None
    watch: tuple[Watch, ...] = ()


class Later(NamedTuple):
    """The text goes on until `at` of its tokens are stored. watch: as of a Pass, of the rows that run meanwhile."""

    at: int
    watch: tuple[Watch, ...] = ()


Seen = NDArray[Any]  # [watches, rows, layers, kv heads, slots] of rows in order; slots: those that were stored when it was asked for
Repair = Generator[Pass | Later, Seen | None, None]


@dataclass(eq=False)
class Reusing:
    """How far the reuse of a text is. spans: to attach once `stored` reaches them; attached: those that are; found: tokens that the prefix
    cache had; begun: whether `repair` did; repair: says which rows run again, None when it has ended; until: the text goes on to here
    before `repair` does; watch, slots: of what repair waits for; seen: what was seen of it, by steps."""

    spans: list[Taken] = field(default_factory=list)
    attached: list[Span] = field(default_factory=list)
    found: int = 0
    begun: bool = False
    repair: Repair | None = None
    until: int | None = None
    watch: tuple[Watch, ...] = ()
    slots: int = 0
    seen: list[Seen] = field(default_factory=list)


class OpenReuse(Protocol):
    @property
    def parallel(self) -> tuple[float, float] | None:
        """Temperature and scale with which rows behind the last chunk attend all chunks as one group, see Parallel in core/view.py; each
        chunk then keeps the cache of its own text. None: these rows attend chunks as they attend other tokens."""
        ...

    @property
    def later(self) -> bool:
        """Whether rows may run again after the first new token. The texts of a request share pages, so it must have one only."""
        ...

    @property
    def after(self) -> int:
        """How many rows after the last span may run again. Their log-probabilities cannot be asked for."""
        ...

    def texts(self, request: Request) -> list[list[int]]:
        """Texts that must be in the cache before the spans of the request are looked for."""
        ...

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        """The spans to reuse, in order and without overlap, within all tokens of the prompt but the last, because one must run. The
        first `stored` tokens are in the cache of the new text already. cached(tokens): how many leading tokens of a text are in the
        cache; a span that reaches beyond them is cut."""
        ...

    def repair(self, text: Spliced) -> Repair:
        """What happens to a text whose spans are attached, one after another; each is done when the next is asked for. Nothing may depend
        on how rows are cut into steps."""
        ...


class AtOnce:
    """An opened method whose rows run again before later ones only, if at all, and attend chunks as other tokens."""

    @property
    def parallel(self) -> tuple[float, float] | None:
        return None

    @property
    def later(self) -> bool:
        return False

    @property
    def after(self) -> int:
        return 0


class Reuse(Protocol):
    """A registered reuse method: hyper-parameters only. needs: what a request must give for it: "before", the text before an edit;
    "segments", a prompt of segments; empty for nothing."""

    card: ClassVar[Card]
    needs: ClassVar[str]

    def open(self, runner: Any) -> OpenReuse: ...
