"""A runner without a model: the memory is real, and a forward pass returns the seconds that it would take."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NoReturn, Protocol, cast

from redraft.core.batch import Batch
from redraft.core.sequence import Space
from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm
from redraft.core.step_cost import Size
from redraft.core.taps import NO_TAPS, Taps
from redraft.errors import Unsupported
from redraft.kv.paged import Paged
from redraft.kv.prefix import Key, PrefixTree
from redraft.kv.table import PageTable

VOCAB = (1 << 31) - 1  # ids that the rows of a batch can hold


class Cost(Protocol):
    """What a step takes; StepCost is one. See Size for the arguments."""

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float: ...


class NoTensors:
    """In place of a backend: it stores nothing and computes nothing."""

    name, dtype, features = "simulated", "none", frozenset[Any]()

    def block_bytes(self, spec: ModelSpec) -> int:
        return 0

    def allocate(self, spec: ModelSpec, blocks: int, room: Any = None) -> None:
        pass

    def zero(self, pool: None, fresh: list[tuple[Space, int]]) -> None:
        pass

    def move(self, pool: None, space: Space, src: Any, dst: Any, delta: int) -> None:
        pass

    def read(self, pool: None, space: Space, pages: Any) -> dict[str, Any]:
        return {}

    def write(self, pool: None, space: Space, pages: Any, arrays: dict[str, Any]) -> None:
        pass

    def define(self, pool: None, fmt: Any) -> NoReturn:
        raise Unsupported("the simulator stores no pages of other formats than the model's own")


class LeanTree(PrefixTree):
    """A prefix tree that takes less time and memory. It does not look for the text that a prompt differs from, which no decision reads.
    Pages with equal tokens that are published one after another share a key."""

    def __init__(self, page: int) -> None:
        super().__init__(page)
        self._last: Key = ("", ())

    def miss(self, tokens: Seq[int], salt: str, max_pages: int = 1000) -> None:
        pass

    def key(self, salt: str, tokens: Seq[int]) -> Key:
        found = super().key(salt, tokens)
        if found != self._last:
            self._last = found
        return self._last


class CostRunner:
    """What an engine needs of redraft.models.runner.Runner. blocks: of 32 tokens; context: the longest text; sharing: whether prompts find
    the cached keys of earlier ones; memory: that of another runner, in place of an own one."""

    def __init__(self, cost: Cost, blocks: int, context: int, *, sharing: bool = True, memory: Paged | None = None) -> None:
        layer = LayerSpec(Attention(1, 1, 1), Mlp(1))
        self.spec = ModelSpec(VOCAB, 1, context, (layer,), Norm(), True, source=_no_weights, family="simulated")
        self.cost, self.backend = cost, NoTensors()
        self.memory = memory or Paged(cast(Any, self.backend), self.spec, blocks, sharing=sharing)
        if memory is None:
            self.memory.table.prefix = LeanTree(self.memory.table.page)
        self.adapters: dict[str, Any] = {}
        self.disk = None
        self.form: dict[str, str] = {}

    @property
    def table(self) -> PageTable:
        return self.memory.table

    def forward(self, batch: Batch, taps: Taps = NO_TAPS) -> float:
        """The seconds of the step."""
        return self.cost.seconds(*Size.of(batch))


def _no_weights(name: str) -> NoReturn:
    raise Unsupported("a simulated model has no weights")
