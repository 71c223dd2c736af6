"""Committed rows that run again: each sees the slots up to its own, and what it writes has the bits of the first time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Rerun, Sequence
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.models.runner import Runner
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.models.test_runner import runner

TEXT, LONG = [3, 1, 4, 1, 5, 9, 2, 6] * 9, [(7 * i + i // 5) % plain.VOCAB for i in range(400)]
EXACT = [("native", "float32"), ("native", "bfloat16")]
NEAR = [("torch", "float64"), ("reference", "float64"), ("numpy", "float64")]


def ran(made: Runner, seq: Sequence, *works: Work) -> None:
    trees = [EMPTY] * len(works)
    made.forward(Batch.pack(works, trees, made.memory.reserve(works, trees)), Taps())
    made.memory.move(made.memory.commit(works, [Accepted()] * len(works)))
    made.memory.check()


def stored(made: Runner, tokens: list[int], number: int = 1, chunk: int = 512) -> Sequence:
    """A text of which all tokens but the last are in the cache."""
    seq = replace(sequence(tokens), id=number)
    made.memory.open(seq)
    while seq.pending > 1:
        ran(made, seq, Work(seq, min(chunk, seq.pending - 1)))
    return seq


def cache(made: Runner, seq: Sequence) -> Any:
    """All keys and values of a text."""
    rows = np.arange(seq.stored, dtype=np.int32)
    return np.stack([np.stack(made.memory.paged.layer(seq, rows, layer)) for layer in range(len(made.spec.layers))])


def spoiled(made: Runner, seq: Sequence, rows: list[int]) -> None:
    """Overwrites the cache of these rows."""
    paged, pages = made.memory.paged, made.memory.paged.table._held[seq.id].lanes[0].pages
    for row in rows:
        places = np.array([pages[row // 32] * 32 + row % 32], np.int32)
        source = np.array([pages[0] * 32], np.int32)
        made.backend.move(paged.pool, paged.table._held[seq.id].pool.space, source, places, 0)


@pytest.mark.parametrize(("backend", "dtype"), [*EXACT, *NEAR])
@pytest.mark.parametrize("rows", [[70], [1, 2, 3], [5, 31, 32, 33, 64, 70], list(range(71))], ids=str)
def test_rows_that_run_again_write_what_they_wrote(backend: str, dtype: str, rows: list[int]) -> None:
    made = runner(backend, dtype)
    seq = stored(made, TEXT)
    before = cache(made, seq)
    spoiled(made, seq, rows)
    assert not np.array_equal(cache(made, seq), before)
    ran(made, seq, Work(seq, 0, rerun=Rerun(np.array(rows, np.int32))))
    if (backend, dtype) in EXACT:
        assert np.array_equal(cache(made, seq), before)
    else:
        assert cache(made, seq) == pytest.approx(before, abs=1e-10)
    assert seq.stored == len(TEXT) - 1


@pytest.mark.parametrize(("backend", "dtype"), EXACT)
def test_beside_other_texts_in_steps_of_any_size(backend: str, dtype: str) -> None:
    """Several groups of pages, and other texts in the same pass: one that is long too, one that decodes, one that runs rows again."""
    made = runner(backend, dtype, blocks=40)
    one, two, three = (stored(made, tokens, i) for i, tokens in enumerate((LONG, TEXT, LONG[:-40])))
    before = cache(made, one), cache(made, three)
    again, others = list(range(40, 399, 3)), [0, 4, 200, 358]
    spoiled(made, one, again)
    spoiled(made, three, others)
    left: Rerun | None = Rerun(np.array(again, np.int32))
    ran(made, one, Work(one, 0, rerun=left.within(50)), Work(two, 1), Work(three, 0, rerun=Rerun(np.array(others, np.int32))))
    left = left.after(50)
    while left is not None:
        ran(made, one, Work(one, 0, rerun=left.within(7)))
        left = left.after(7)
    assert np.array_equal(cache(made, one), before[0]) and np.array_equal(cache(made, three), before[1])


@pytest.mark.parametrize(("backend", "dtype"), [EXACT[0], (BACKEND, "float64")])
def test_some_layers_only(backend: str, dtype: str) -> None:
    """The first layers run again, the others keep what they had."""
    made = runner(backend, dtype)
    seq = stored(made, TEXT)
    before, rows = cache(made, seq), list(range(3, 60))
    spoiled(made, seq, rows)
    wrong = cache(made, seq)
    ran(made, seq, Work(seq, 0, rerun=Rerun(np.array(rows, np.int32), Layers.whole(range(2)), 2 / 6)))
    after = cache(made, seq)
    assert after[:2] == pytest.approx(before[:2], abs=1e-10) and np.array_equal(after[2:], wrong[2:])


def test_rows_of_shared_pages_cannot_run_again() -> None:
    made = runner(BACKEND)
    seq = stored(made, TEXT)
    made.memory.publish(seq)
    with pytest.raises(AssertionError, match="cannot run again"):
        made.memory.reserve([Work(seq, 0, rerun=Rerun(np.array([40], np.int32)))], [EMPTY])
    made.memory.reserve([Work(seq, 0, rerun=Rerun(np.array([64, 70], np.int32)))], [EMPTY])  # of the last page, which is not full


def test_the_time_of_rows_through_some_layers() -> None:
    rerun = Rerun(np.arange(100, dtype=np.int32), None, 1 / 15)
    assert rerun.cost == 7
    some = rerun.within(2)
    assert some is not None and len(some.slots) == 30
    assert Rerun(rerun.slots, None, 1.0).within(0) is None
    rest = rerun.after(30)
    assert rest is not None and rest.slots[0] == 30 and rest.after(70) is None
