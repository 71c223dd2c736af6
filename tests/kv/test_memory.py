"""Combined memories, and export and import between engines."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import CachePlan, Lanes, Sequence, Space
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.kv.parcel import Lost, StoredText
from redraft.kv.slots import Kept
from redraft.kv.table import OutOfPages
from redraft.models.runner import Runner
from redraft.ops.backend import WeightSums
from redraft.ops.format import Format, plain
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from redraft.ops.torch_pool import Exact
from tests.arrays import placed
from tests.contracts import hybrid
from tests.contracts import plain as definition
from tests.kv.state import State


def made(ident: int, tokens: Seq[int], lanes: Lanes = Lanes.SHARED) -> Sequence:
    seq = sequence(tokens)
    seq.id, seq.cache = ident, CachePlan(lanes=lanes)
    return seq


def run(runner: Runner, seq: Sequence, rows: int, tree: TokenTree = EMPTY) -> Any:
    """The logits of the last rows. The drafts are all rejected."""
    work = [Work(seq, rows)]
    out = runner.forward(Batch.pack(work, [tree], runner.memory.reserve(work, [tree])), Taps(logits=True))
    runner.memory.move(runner.memory.commit(work, [Accepted((), (0,) if work[0].done else ())]))
    runner.memory.publish(seq)
    runner.memory.check()
    return out.logits


def hybrids() -> tuple[Memories, Paged, State]:
    runner = hybrid.runner("torch", 20)
    assert isinstance(runner.memory, Memories)
    (state,) = runner.memory.others
    assert isinstance(state, State)
    return runner.memory, runner.memory.paged, state


# ---- demoted slots


def test_a_policy_sees_what_is_not_demoted() -> None:
    """Keys, positions and statistics are those of the slots that were kept, in lanes that gave up different numbers."""
    backend = TorchOps(torch.float64)
    spec = definition.tiny()[0]
    paged = Paged(backend, spec, 40)
    fmt = Format("codes", plain(torch.float64, spec.head_dim), Exact())
    paged.define(fmt)
    seq = made(1, range(130), Lanes.PER_HEAD)
    seq.cache = CachePlan(lanes=Lanes.PER_HEAD, encoded="codes")
    paged.open(seq)
    work = [Work(seq, 100)]
    paged.reserve(work, [EMPTY])
    paged.commit(work, [Accepted()])
    lanes = paged.table.lanes(seq)
    data = paged.pool.data
    data.copy_(torch.arange(data.numel(), dtype=torch.float64).view(data.shape))
    before = [paged.held(seq).read(lane) for lane in range(lanes)]
    assert [part.shape for part in paged.held(seq).read(0, 32, 32)] == [(1, 0, spec.head_dim)] * 2, "no slots, at the border of a page"
    dice = Random(1)
    first = [sorted(dice.sample(range(100), 30 + lane)) for lane in range(lanes)]
    paged.demote(seq, Kept([np.array(slots, np.int32) for slots in first]))
    second = [sorted(dice.sample(range(len(slots)), 20 - lane)) for lane, slots in enumerate(first)]
    paged.demote(seq, Kept([np.array(slots, np.int32) for slots in second]))
    paged.check()
    stay = [[slots[i] for i in chosen] for slots, chosen in zip(first, second, strict=True)]
    held = paged.held(seq)
    assert [lane.tolist() for lane in held.positions()] == stay
    for lane, slots in enumerate(stay):
        for now, old in zip(held.read(lane), before[lane], strict=True):
            assert np.array_equal(now, old[:, slots])
        assert np.array_equal(held.read(lane, 3, 9)[0], before[lane][0][:, slots[3:9]])
    kinds = (len(spec.attention), spec.kv_heads)
    chain, nodes = np.zeros((1, *kinds, 105)), np.zeros((1, 2, *kinds, 105))
    for lane, one in enumerate(paged.table._held[1].lanes):
        assert one.positions is not None
        at = [*one.positions[:100].tolist(), *range(100, 105)]
        chain[0].reshape(-1, 105)[lane] = at
        nodes.reshape(2, -1, 105)[:, lane] = at
    found = paged.watched(seq, WeightSums(chain, nodes))
    for lane, slots in enumerate(stay):
        seen = [*slots, *range(100, 105)]
        assert np.asarray(found.chain).reshape(lanes, -1)[lane, : len(seen)].tolist() == seen
        assert np.asarray(found.nodes).reshape(2, lanes, -1)[1, lane, : len(seen)].tolist() == seen


# ---- combined memories


def test_a_prefix_matches_as_far_as_all_agree() -> None:
    runner, tokens = hybrid.runner("torch", 20), [i % 24 for i in range(140)]
    memory = runner.memory
    assert isinstance(memory, Memories)
    paged, (state,) = memory.paged, memory.others
    assert isinstance(state, State)
    seq = made(1, tokens)
    memory.open(seq)
    run(runner, seq, 139)
    assert memory.match(tokens, "") == 128 and memory.match(tokens[:128], "") == 96 and memory.match(tokens, "other") == 0
    for lost in (128, 96, 64):
        del state.found["", tuple(tokens[:lost])]
    assert (paged.match(tokens, ""), state.match(tokens, ""), memory.match(tokens, "")) == (128, 32, 32)
    other = made(2, [*tokens[:100], 3])
    memory.open(other)
    memory.attach(other, 32)
    assert other.stored == 32 and len(paged.table._held[2].lanes[0].pages) == 1


@pytest.mark.parametrize(
    ("pages", "states", "common"),
    [((32, 64), (32, 96), 32), ((32, 64), (96,), 0), ((32, 64, 96), (32, 96), 96), ((32, 64), (64, 96), 64), ((), (32,), 0)],
)
def test_one_memory_may_have_what_lies_between_those_of_another(pages: tuple[int, ...], states: tuple[int, ...], common: int) -> None:
    class Has:
        blocks = 9

        def __init__(self, *lengths: int) -> None:
            self.lengths = lengths

        def match(self, tokens: Seq[int], salt: str) -> int:
            return max((n for n in self.lengths if n < len(tokens)), default=0)

    memory: Any = Memories
    assert memory(Has(*pages), Has(*states)).match(range(200), "") == common
    assert memory(Has(*pages), Has(*states)).match([], "") == 0


def test_the_scarcest_memory_decides() -> None:
    memory, paged, state = hybrids()
    seq = made(1, range(20))
    memory.open(seq)
    assert memory.available() == min(paged.available(), state.available()) == 20
    for rows in (1, 40, 300):
        assert memory.need(seq, rows) == max(paged.need(seq, rows), state.need(seq, rows))
    work = [Work(seq, 20)]
    memory.reserve(work, [EMPTY])
    memory.discard(seq)
    taken = [state._take() for _ in range(state.slots - 60)]
    assert memory.available() == state.available() == 1 < paged.available() and memory.used() == 19
    for slot in taken:
        state._drop(slot)
    memory.free(seq)
    memory.check()
    assert memory.used() == 0


def test_sums_that_fit_in_one_figure_fit_in_each_memory() -> None:
    """Sequences run, with drafts, while the sum of needs is available. No memory ever runs out."""
    dice = Random(3)
    for seed in range(20):
        spec = hybrid.tiny()[0]
        paged = Paged(TorchOps(torch.float64), spec, 12)
        memory = Memories(paged, State(spec, dice.choice([40, 90, 300]), 12))
        seqs: list[Sequence] = []
        for ident in range(60):
            seq = made(1000 * seed + ident, [dice.randrange(3) for _ in range(dice.randrange(2, 90))])
            if memory.need(seq, len(seq.tokens)) <= memory.available() - sum(memory.need(s, s.pending) for s in seqs):
                memory.open(seq)
                memory.attach(seq, memory.match(seq.tokens, "") if not seqs else 0)
                seqs.append(seq)
            elif seqs:
                left = seqs.pop(dice.randrange(len(seqs)))
                gain, before = memory.gain(left), memory.available()
                memory.free(left)
                assert memory.available() >= before + gain
            free = memory.available()
            work, trees = [], []
            for s in seqs:
                drafts = dice.randrange(5) if s.pending == 1 else 0
                need = memory.need(s, s.pending + drafts)
                if need <= free:
                    free -= need
                    work.append(Work(s, s.pending))
                    trees.append(TokenTree.chain([7] * drafts))
            memory.reserve(work, trees)
            accepted = [Accepted(tuple(range(n := dice.randrange(len(t) + 1))), (7,) * (n + 1)) for t in trees]
            paged.table.check()
            memory.commit(work, accepted)
            for w in work:
                memory.publish(w.seq)
            memory.check()


def test_a_fork_that_fails_in_one_memory_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, paged, state = hybrids()
    seq, child = made(1, range(20)), made(2, range(20))
    memory.open(seq)

    def fails(*given: Any) -> None:
        raise OutOfPages

    monkeypatch.setattr(state, "fork", fails)
    with pytest.raises(OutOfPages):
        memory.fork(seq, child)
    memory.check()
    assert child.id not in paged.table._held and child.stored == 0
    monkeypatch.undo()
    monkeypatch.setattr(paged.store, "move", fails)
    with pytest.raises(OutOfPages):
        memory.fork(seq, child)
    assert child.id not in paged.table._held and child.id not in state.held


# ---- between engines


def runner(backend: Any, blocks: int = 20, layers: int = 2) -> Runner:
    spec, weights = definition.tiny(layers=layers)
    own = backend(torch.float64)
    return Runner(spec, placed(own, weights), own, blocks)


@pytest.mark.parametrize("lanes", Lanes)
@pytest.mark.parametrize("backend", [Reference, TorchOps])
def test_an_exported_text_continues_in_another_engine(backend: Any, lanes: Lanes) -> None:
    """The imported text continues bit for bit as the exported one, also after an eviction."""
    dice = Random(1)
    tokens = [dice.randrange(definition.VOCAB) for _ in range(75)]
    for evicts in (False, True):
        here, there = runner(backend), runner(backend)
        run(there, made_open(there, made(9, [3] * 40)), 40)  # other pages are taken there
        seq = made_open(here, made(1, tokens, lanes))
        run(here, seq, 70)
        if evicts:
            kept = [np.sort(np.array(dice.sample(range(70), 50), np.int32)) for _ in here.memory.paged.table.positions(seq)]
            here.memory.paged.keep(seq, Kept(kept))
        moved = made(1, tokens, lanes)
        moves(here, seq, there, moved)
        there.memory.check()
        assert moved.stored == 70 and all(map(np.array_equal, *(r.memory.paged.table.positions(seq) for r in (here, there))))
        tree = TokenTree.chain([1, 2])
        assert torch.equal(run(here, seq, 5, tree), run(there, moved, 5, tree))
        there.memory.free(moved)
        there.memory.check()


def moves(here: Runner, seq: Sequence, there: Runner, moved: Sequence) -> None:
    """Opens `moved` with what `seq` has stored here."""
    there.memory.import_(moved, here.memory.export(seq), 0, here.memory.read)


def made_open(runner: Runner, seq: Sequence) -> Sequence:
    runner.memory.open(seq)
    return seq


@pytest.mark.parametrize("backend", [Reference, TorchOps])
def test_coded_pages_travel_too(backend: Any) -> None:
    tokens, runners = [i % 24 for i in range(70)], (runner(backend), runner(backend))
    for one in runners:
        arrays = plain(torch.float64, one.spec.head_dim)
        one.memory.paged.define(Format("toy", arrays, None))
    here, there = runners
    seqs = []
    for _ in runners:
        seqs.append(made(1, tokens))
        seqs[-1].cache = CachePlan(lanes=Lanes.PER_HEAD, encoded="toy", encode_every=32)
    run(here, made_open(here, seqs[0]), 64)
    here.memory.paged.encode(seqs[0])
    moves(here, seqs[0], there, seqs[1])
    for one, seq in zip(runners, seqs, strict=True):
        one.memory.check()
        held = one.memory.paged.table._held[seq.id]
        assert [len(lane.encoded) for lane in held.lanes] == [2] * 4
    exports = [one.memory.export(seq) for one, seq in zip(runners, seqs, strict=True)]
    assert [len(one.codes) for one in exports] == [8, 8] and exports[0].code_sums == exports[1].code_sums and any(exports[0].code_sums)


def test_a_hybrid_takes_its_state_along() -> None:
    dice = Random(2)
    tokens = [dice.randrange(definition.VOCAB) for _ in range(50)]
    here, there = hybrid.runner("torch", 8), hybrid.runner("torch", 8)
    seq, moved = made(1, tokens), made(1, tokens)
    run(here, made_open(here, seq), 45)
    moves(here, seq, there, moved)
    assert torch.equal(run(here, seq, 5), run(there, moved, 5))


def test_what_does_not_fit_is_not_open() -> None:
    here, there = runner(TorchOps), runner(TorchOps, 2)
    seq, moved = made_open(here, made(1, [1] * 90)), made(1, [1] * 90)
    run(here, seq, 80)
    with pytest.raises(OutOfPages):
        moves(here, seq, there, moved)
    there.memory.check()
    assert there.memory.used() == 0 and moved.stored == 0


TEXT = [i % definition.VOCAB for i in range(80)]


def test_pages_that_are_published_already_are_not_copied() -> None:
    here, there = runner(TorchOps), runner(TorchOps)
    seq, other, moved = made_open(here, made(1, TEXT)), made_open(there, made(7, TEXT)), made(1, TEXT)
    run(here, seq, 75)
    run(there, other, 70)
    there.memory.publish(other)
    copied: list[int] = []
    there.memory.import_(moved, here.memory.export(seq), 64, lambda space, pages: copied.extend(pages) or here.memory.read(space, pages))
    there.memory.check()
    assert copied == here.memory.export(seq).pages[2:] and moved.stored == 75
    assert torch.equal(run(here, seq, 5), run(there, moved, 5))


@pytest.mark.parametrize("fault", ["content", "short", "gone"])
def test_what_does_not_arrive_is_not_open(fault: str) -> None:
    """Pages with other contents, too few of them, or none."""
    here, there = runner(TorchOps), runner(TorchOps)
    seq, moved = made_open(here, made(1, TEXT[:75])), made(1, TEXT[:75])
    run(here, seq, 70)
    stored = here.memory.export(seq)

    def read(space: Space, pages: np.ndarray) -> Any:
        if fault == "gone":
            raise ConnectionResetError
        arrays = here.memory.read(space, pages)
        if fault == "short":
            return {name: array[1:] for name, array in arrays.items()}
        arrays["values"][-1, -1, -1, 5] = 0.5
        return arrays

    with pytest.raises(ConnectionResetError if fault == "gone" else Lost):
        there.memory.import_(moved, stored, 0, read)
    there.memory.check()
    assert there.memory.used() == 0 and moved.stored == 0
    there.memory.import_(moved, stored, 0, here.memory.read)
    assert torch.equal(run(here, seq, 5), run(there, moved, 5))


def test_an_export_survives_json() -> None:
    one = runner(TorchOps)
    seq = made_open(one, made(1, TEXT[:75], Lanes.PER_LAYER))
    run(one, seq, 70)
    one.memory.paged.keep(seq, Kept([np.arange(20), np.arange(40)]))
    before = one.memory.export(seq)
    after = StoredText.of(json.loads(json.dumps(before.numbers())))
    assert [list(lane.positions) for lane in after.lanes] == [list(lane.positions) for lane in before.lanes]
    plain = [[lane._replace(positions=None) for lane in one.lanes] for one in (before, after)]
    assert before._replace(lanes=plain[0]) == after._replace(lanes=plain[1])
