"""RazorAttention: which slots stay, and that the slot of the mean has the mean of everything that was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redraft import LLM, SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, CachePlan
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.eviction.razor import Razor, RazorAttention
from redraft.kv.eviction.retrieval_heads import HeadProfile
from redraft.kv.paged import Paged
from redraft.kv.slots import Held, Kept
from redraft.models.trained import model_hash
from redraft.ops.reference import Reference
from tests.ops.test_views import HEADS, LAYERS, SIZE, Even, model

WHOLE = np.array([[True, False], [False, False]])
LANES = LAYERS * HEADS


def policy(whole: Any = WHOLE, sinks: int = 2, recent: int = 40, share: float = 0.0, every: int = 32, mean: bool = True) -> Razor:
    return Razor(whole, sinks, recent, share, every, mean, page=32)


class Cache:
    """Real pages with random keys and values, written by attention steps of the reference."""

    def __init__(self, own: Razor, context: int) -> None:
        self.policy, self.spec = own, model()
        self.memory = Paged(Reference(), self.spec, 40)
        self.seq = sequence([0])
        self.seq.request.context, self.seq.cache = context, CachePlan(own, lanes=own.lanes)
        self.memory.open(self.seq)
        dice = np.random.default_rng(3)
        self.rows = dice.standard_normal((2, 400, LAYERS, HEADS, SIZE)).astype(np.float32)
        self.kept: list[int] = []

    def run(self, tokens: int, chunk: int = 1000, same: bool = False) -> Cache:
        ops, seq = self.memory.store.backend, self.seq
        while seq.stored < tokens:
            rows = min(self.policy.sync_point(seq), tokens, seq.stored + chunk) - seq.stored
            seq.tokens = [0] * (seq.stored + rows)
            work = [Work(seq, rows)]
            batch = Batch.pack(work, [EMPTY], self.memory.reserve(work, [EMPTY]))
            plan = ops.plan(batch, self.spec)
            for i, layer in enumerate(self.spec.attention):
                at = np.zeros(rows, int) + 7 if same else np.arange(seq.stored, seq.stored + rows)
                k, v = (torch.from_numpy(part[at, i]).double() for part in self.rows)
                ops.attend(i, layer, torch.zeros(rows, layer.heads, SIZE, dtype=torch.float64), k, v, self.memory.pool, plan)
            self.memory.move(self.memory.commit(work, [Accepted((), (0,))]))
            if (kept := self.decide()) is not None:
                self.kept.append(seq.stored)
                self.memory.keep(seq, kept)
                assert self.decide() is None, "two decisions at one count"
            self.memory.check()
        return self

    def decide(self) -> Kept | None:
        return self.policy.decide(self.seq, self.memory.held(self.seq))

    @property
    def held(self) -> Held:
        return self.memory.held(self.seq)


def test_windows_of_some_heads_and_whole_heads() -> None:
    cache = Cache(policy(), context=150).run(150)
    first, windowed = list(range(150)), [*range(32), *range(96, 150)]  # 150 - 40 lies in the page of 96
    assert [lane.tolist() for lane in cache.held.positions()] == [first, windowed, windowed, windowed] and cache.kept == [150]
    cache.run(220)
    assert cache.kept == [150, 182, 214]
    assert cache.held.positions()[3].tolist() == [*range(32), *range(160, 220)] and len(cache.held.positions()[0]) == 220


@pytest.mark.parametrize("chunk", [1000, 7])
def test_the_running_mean_is_the_mean_of_all_that_was_dropped(chunk: int) -> None:
    cache = Cache(policy(), context=100).run(230, chunk)
    assert len(cache.kept) > 2
    logs = cache.memory.table.reserve([Work(cache.seq, 0)], [EMPTY]).logs[0]
    assert logs is not None and not logs[0].any()
    for lane in (1, 2, 3):
        gone = int(cache.held.positions()[lane][32])
        keys, values = cache.held.read(lane)
        for i, part in enumerate((keys, values)):
            expected = cache.rows[i, 31:gone, lane // HEADS, lane % HEADS].mean(0)
            assert part[0, 31] == pytest.approx(expected, abs=1e-6)
            assert part[0, 32] == pytest.approx(cache.rows[i, gone, lane // HEADS, lane % HEADS])
        assert np.exp(logs[lane][31]) == pytest.approx(gone - 31) and np.count_nonzero(logs[lane]) == 1


def test_equal_dropped_keys_are_attended_exactly() -> None:
    outs = []
    for own in (policy(), policy(np.ones_like(WHOLE))):
        cache = Cache(own, context=200).run(200, same=True)
        cache.seq.tokens = [0] * 201
        work, ops = [Work(cache.seq, 1)], cache.memory.store.backend
        plan = ops.plan(Batch.pack(work, [EMPTY], cache.memory.reserve(work, [EMPTY])), cache.spec)
        dice = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, n, SIZE, generator=dice, dtype=torch.float64) for n in (2 * HEADS, HEADS, HEADS))
        outs.append([ops.attend(i, layer, q, k, v, cache.memory.pool, plan) for i, layer in enumerate(cache.spec.attention)])
    for one, other in zip(*outs, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_nothing_to_drop_makes_no_slot() -> None:
    cache = Cache(policy(recent=90), context=100).run(140)
    assert cache.kept == [] and cache.memory.table.reserve([Work(cache.seq, 0)], [EMPTY]).logs == [None]
    assert policy(np.ones_like(WHOLE)).onset(4000).at == UNLIMITED == policy(share=1.0).onset(100).at


@pytest.mark.parametrize(
    ("recent", "share", "every", "context"), [(40, 0.0, 32, 10), (40, 0.2, 8, 300), (7, 0.5, 13, 64), (64, 0.9, 50, 90)]
)
def test_its_onset_is_what_it_does(recent: int, share: float, every: int, context: int) -> None:
    own = policy(recent=recent, share=share, every=every)
    onset = own.onset(context)
    if onset.at > 380:
        return
    cache = Cache(own, context=context).run(onset.at)
    assert cache.kept == [onset.at]
    held = [len(lane) for lane in cache.held.positions()]
    assert sum(held) / len(held) <= onset.slots < sum(held) / len(held) + 1


def test_a_fork_keeps_its_mean() -> None:
    """The pages that both list are not written."""
    cache = Cache(policy(), context=150).run(150)
    child = sequence([0] * 150)
    child.id, child.cache, child.stored = 7, cache.seq.cache, 150
    cache.memory.fork(cache.seq, child)
    before = cache.memory._lane(child, 1)
    cache.run(220)
    after = cache.memory._lane(child, 1)
    assert all(map(np.array_equal, before, after)) and not np.array_equal(cache.held.read(1)[0][0, 31], before[0][0, 31])


def test_a_budget_is_shared_between_the_heads(tmp_path: Path) -> None:
    llm = LLM("embedded", draft="none")
    scores = np.random.default_rng(1).random((len(llm.runner.spec.attention), llm.runner.spec.kv_heads)).astype(np.float32)
    file = HeadProfile(scores, scores, model_hash(llm.runner), 1).save(tmp_path / "heads.safetensors")
    for budget in (0.9, 0.5, 0.25):
        own = RazorAttention(budget=budget, recent=1, induction=0.5, profile=file).open(llm.runner)
        assert isinstance(own, Razor)
        whole = float(own.whole.mean())
        assert whole <= budget / 2 + 1 / own.whole.size and whole + (1 - whole) * own.share == pytest.approx(budget)
    with pytest.raises(InvalidInput, match=r"^razor:share=2: must be 0 to 1$"):
        RazorAttention(share=2)


def test_what_it_can_be_combined_with(tmp_path: Path) -> None:
    """A sparse read with data of each slot would keep those of a slot that was written."""
    llm = LLM("embedded", draft="none", max_seqs=2)
    scores = np.zeros((len(llm.runner.spec.attention), llm.runner.spec.kv_heads), np.float32)
    file = HeadProfile(scores, scores, model_hash(llm.runner), 1).save(tmp_path / "heads.safetensors")
    llm.engine.policies.check(SamplingParams(keep=f"razor:profile={file}", read="page-top-k"))
    llm.engine.policies.check(SamplingParams(keep=f"razor:profile={file}", codec="int8"))
    with pytest.raises(Unsupported, match="merges slots"):
        llm.engine.policies._plan(None, keep=RazorAttention(profile=file).open(llm.runner), read=Even())  # type: ignore[arg-type]
