"""Unsupported layers are refused by name before weights are read. Segments of layers end where attention ends."""

from __future__ import annotations

from typing import Any

import pytest

from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.spec import CrossAttention, Recurrent
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.errors import Unsupported
from redraft.models import mixers
from redraft.ops.backend import Feature
from redraft.ops.reference import Reference
from tests.contracts import hybrid
from tests.core.test_spec import NARROW, WIDE, spec


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((WIDE, Recurrent((3,))), r"^layer 1: backend reference does not compute Recurrent$"),
        ((WIDE, WIDE, CrossAttention(8, 4, 16)), r"^layer 2: backend reference does not compute CrossAttention$"),
        ((WIDE, NARROW), r"^the layers' pages must have one shape, not layer 0: 4 kv heads of 16; layer 1: 2 kv heads of 16$"),
    ],
)
def test_what_is_not_served_is_refused_by_name(made: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        mixers.check(spec(*made), Reference())


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"^the layers' pages must have one shape, not none at all$"):
        mixers.check(spec(hybrid.Gated((3,))), hybrid.HybridReference())


def test_segments_end_at_taps_and_at_layers_without_attention() -> None:
    made = hybrid.runner("reference", 4)
    assert list(made.segments(Taps())) == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]
    assert list(made.segments(Taps(hidden=frozenset({1})))) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


def test_a_backend_runs_segments_of_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Runs(hybrid.HybridReference):
        features = hybrid.HybridReference.features | {Feature.RUN}

        def run(self, first: int, last: int, *rest: Any) -> None:
            seen.append((first, last))

        def forward(self, *given: Any) -> None:
            return None

    monkeypatch.setitem(hybrid.BACKENDS, "runs", Runs)
    made = hybrid.runner("runs", 4)
    seq = sequence([1, 2, 3])
    made.memory.open(seq)
    work = [Work(seq, 3)]
    made.forward(Batch.pack(work, [EMPTY], made.memory.reserve(work, [EMPTY])))
    assert seen == [(1, 3), (4, 5)]
