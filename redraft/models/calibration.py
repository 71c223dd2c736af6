"""Runs texts through a model and shows what enters attention. For calibrations of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, cast

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.spec import Attention
from redraft.core.tree import EMPTY

if TYPE_CHECKING:
    from redraft.models.runner import Runner
    from redraft.ops.backend import Backend

Seen = Callable[[int, Attention, Any, Any, Any], None]
"""Called with the index of a layer, the layer, and its queries, keys and values [T, heads, D] of all rows of a text, rotated."""


def run(runner: Runner, texts: Iterable[Seq[int]], longest: int, seen: Seen) -> None:
    """Runs each text, of at most `longest` tokens, alone and in one pass."""
    from redraft.models.runner import Runner

    own = Runner(runner.spec, runner.weights, cast("Backend", _Shown(runner.backend, seen)), -(-longest // 32) + 1)
    for i, text in enumerate(texts):
        tokens = [int(token) for token in text]
        seq = Sequence(i, Request("calibration", tokens, SamplingParams()), 0, tokens, len(tokens), seed=0, sync_point=UNLIMITED)
        own.memory.open(seq)
        work = [Work(seq, len(tokens))]
        own.forward(Batch.pack(work, [EMPTY], own.memory.reserve(work, [EMPTY])))
        own.memory.free(seq)


class _Shown:
    """Wraps a backend."""

    def __init__(self, backend: Backend, seen: Seen) -> None:
        self._backend, self._seen = backend, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *of: Any) -> None:
        """Returns None, as `run` does, so every layer runs operation by operation and calls `attend`."""

    run = forward

    def attend(self, index: int, layer: Attention, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        self._seen(index, layer, q, k, v)
        return self._backend.attend(index, layer, q, k, v, *rest)
