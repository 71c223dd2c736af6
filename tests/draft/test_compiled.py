"""The compiled planner drafts the nodes of the Python one, learns the same weights, and stops the same drafters."""

from __future__ import annotations

import random
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redraft.config import SamplingParams
from redraft.core.cost import KNOTS, CostModel
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.compiled import CompiledPlanner, bind, fits
from redraft.draft.drafter import OpenDrafter, Stateless
from redraft.draft.ngram import Counter
from redraft.draft.planner import Planner
from redraft.draft.suffix import Voter
from redraft.draft.token_recycling import Recycler
from redraft.ops import library

VOCAB = 40
loaded = library.load()
pytestmark = pytest.mark.skipif(loaded is None, reason="no native library")


class Table(Recycler):
    """Learns nothing by itself."""

    def observe(self, result: StepResult) -> None:
        pass


class Chains(Stateless):
    """Proposes trees, has no compiled form. The arrays are columns of another one."""

    def propose(self, seqs: Any, budgets: Any) -> list[TokenTree]:
        return [self._tree(seq.tokens[-1]) for seq in seqs]

    def _tree(self, t: int) -> TokenTree:
        tree = TokenTree.build([t, (t + 1) % VOCAB, 7], [-1, 0, 0], vocab=VOCAB, rows=3, depth=2) if t % 3 else TokenTree.chain(())
        both = np.stack([tree.tokens, tree.parents], 1)
        return TokenTree(both[:, 0], both[:, 1], tree.kinds)


def parts(kinds: str) -> list[OpenDrafter]:
    made = {"s": lambda: Voter(150), "n": lambda: Counter(60), "t": lambda: Table(VOCAB, 4), "c": Chains}
    return [made[kind]() for kind in kinds]


class Traffic:
    """One planner and its texts. Everything random is drawn from `seed`, so two of them see the same."""

    def __init__(self, kinds: str, compiled: bool, seed: int, timed: bool, slope: float) -> None:
        self.rng, self.ticks, self.asked = random.Random(seed), count(), count()
        made = parts(kinds)
        cost = CostModel([1 + slope * (knot - 1) for knot in KNOTS])
        given: dict[str, Any] = {"timed": timed, "clock": self.clock}
        if compiled:
            assert loaded is not None and all(map(fits, made))
            self.planner: Planner = CompiledPlanner(bind(loaded.c), list(kinds), made, cost, **given)  # type: ignore[arg-type]
        else:
            self.planner = Planner(list(kinds), made, cost, **given)
        self.planner.timer = lambda: 0.003 * next(self.asked)  # a drafter of trees takes so long each time
        self.table = next((part.matrix for part in made if isinstance(part, Table)), None)
        self.seqs: list[Sequence] = []
        self.number = 0
        self.saved: Any = None
        self.log: list[Any] = []

    def clock(self) -> float:
        """Asked four times a step: drafting and learning take a hundredth of the model's time."""
        steps, part = divmod(next(self.ticks), 4)
        return steps + (0.0, 0.01, 0.99, 1.0)[part]

    def begin(self) -> None:
        rng = self.rng
        period = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 9))]
        prompt = [period[i % len(period)] if rng.random() < 0.9 else rng.randrange(VOCAB) for i in range(rng.randint(1, 40))]
        request = Request(str(self.number), prompt, SamplingParams(), salt=rng.choice(["", "a", "a\0", "\ud800"]))
        seq = Sequence(self.number, request, 0, list(prompt), len(prompt), 0, 1 << 20, stored=len(prompt) - 1)
        seq.state[self.planner] = self.planner.begin(seq)
        seq.state["period"] = period
        self.number += 1
        self.seqs.append(seq)

    def end(self, seq: Sequence) -> None:
        self.planner.end(seq.state.pop(self.planner))
        self.seqs.remove(seq)

    def comes(self, seq: Sequence, at: int) -> int:
        period = seq.state["period"]
        noise = random.Random(seq.id * 7919 + at)
        return int(period[at % len(period)]) if noise.random() < 0.8 else noise.randrange(VOCAB)

    def step(self) -> None:
        rng, seqs = self.rng, list(self.seqs)
        if self.table is not None:
            self.table[rng.randrange(VOCAB)] = rng.sample(range(VOCAB), 4) if rng.random() < 0.9 else [-1] * 4
        budgets = [Budget(0 if seq.rest else rng.choice([0, 3, 15, 15]), rng.choice([1, 4, 15])) for seq in seqs]
        for seq in seqs:
            seq.rest = max(0, seq.rest - 1)
        trees = self.planner.propose(seqs, budgets)
        accepted = []
        for seq, tree, budget in zip(seqs, trees, budgets, strict=True):
            tree.check(vocab=VOCAB, rows=max(0, budget.rows), depth=max(0, budget.depth))
            path: list[int] = []
            while True:
                token = self.comes(seq, len(seq.tokens) + len(path))
                child = tree.child(path[-1] if path else -1, token)
                if child < 0:
                    break
                path.append(child)
            tokens = [*(int(tree.tokens[node]) for node in path), token]
            seq.tokens += tokens
            seq.stored = len(seq.tokens) - 1
            accepted.append(Accepted(tuple(path), tuple(tokens)))
        drafted = sum(map(len, trees))
        batch: Any = SimpleNamespace(tokens=[0] * (len(seqs) + drafted))
        self.planner.observe(StepResult([Work(seq, 1) for seq in seqs], trees, batch, accepted, None, None))  # type: ignore[arg-type]
        for seq, tree in zip(seqs, trees, strict=True):
            arrays = [tree.tokens, tree.parents, *([] if tree.origins is None else [tree.origins, tree.scores])]
            self.log.append((seq.id, *(array.tolist() for array in arrays), list(self.planner.stopped(seq)), seq.rest))

    def run(self, steps: int) -> None:
        rng = self.rng
        for step in range(steps):
            if not self.seqs or (len(self.seqs) < 4 and rng.random() < 0.2):
                self.begin()
            if rng.random() < 0.08:
                self.end(rng.choice(self.seqs))
            elif rng.random() < 0.05:
                self.fork(rng.choice(self.seqs))
            if step == steps // 3:
                self.saved = self.planner.snapshot()
            if step == 2 * steps // 3:
                for seq in list(self.seqs):
                    self.end(seq)
                self.planner.restore(self.saved)
            if self.seqs:
                self.step()

    def fork(self, seq: Sequence) -> None:
        child = Sequence(self.number, seq.request, 0, list(seq.tokens), seq.prompt_len, 0, 1 << 20, stored=seq.stored)
        child.state[self.planner] = self.planner.fork(seq.state[self.planner], child)
        child.state["period"] = seq.state["period"]
        self.number += 1
        self.seqs.append(child)


@pytest.mark.parametrize("kinds", ["snt", "s", "n", "t", "sntc", "c"])
@pytest.mark.parametrize(("timed", "slope"), [(True, 0.02), (True, 0.15), (True, 0.6), (False, 0.1)])
def test_both_forms_draft_the_same_nodes(kinds: str, timed: bool, slope: float) -> None:
    drafted = 0
    for seed in range(3):
        python, compiled = (Traffic(kinds, form, seed, timed, slope) for form in (False, True))
        python.run(120)
        compiled.run(120)
        assert compiled.log == python.log
        assert compiled.planner.acceptance.snapshot() == python.planner.acceptance.snapshot()
        assert compiled.planner.cost.shape == python.planner.cost.shape
        assert compiled.planner.bytes == python.planner.bytes
        drafted += sum(len(entry[1]) for entry in python.log)
    assert drafted or slope > 0.5


def test_a_drafter_that_offers_tokens_without_a_compiled_form_does_not_fit() -> None:
    class Own(Stateless):
        buckets = 1

        def start(self, seq: Any) -> Any: ...
        def follow(self, place: Any, token: int) -> Any: ...
        def offers(self, place: Any) -> Any: ...

    assert not fits(Own()) and fits(Chains()) and fits(Voter(1))


def test_a_long_repetition_stays_cheap() -> None:
    """Each of many thousand equal tokens extends a bounded number of matches."""
    assert loaded is not None
    made = parts("s")
    found = CompiledPlanner(bind(loaded.c), ["s"], made, CostModel())  # type: ignore[arg-type]
    request = Request("1", [7], SamplingParams())
    seq = Sequence(1, request, 0, [7], 1, 0, 1 << 20)
    seq.state[found] = found.begin(seq)
    for _ in range(3000):
        (tree,) = found.propose([seq], [Budget(2, 2)])
        seq.tokens.append(7)
        seq.state[found].quiet = 0  # as if the drafts were kept
    assert tree.tokens.tolist() == [7, 7]


class Broken(Stateless):
    """Proposes what no drafter may, once `tree` is set, or raises."""

    tree: TokenTree | None = TokenTree.chain(())

    def propose(self, seqs: Any, budgets: Any) -> list[Any]:
        if self.tree is None:
            raise RuntimeError("broken")
        return [self.tree for _ in seqs]


def test_a_broken_part_loses_no_token_and_reads_no_foreign_memory() -> None:
    assert loaded is not None
    broken = Broken()
    found = CompiledPlanner(bind(loaded.c), ["c", "s", "t"], [broken, *parts("st")], CostModel())  # type: ignore[arg-type]
    seq = Sequence(1, Request("1", [5, 6, 7], SamplingParams()), 0, [5, 6, 7], 3, 0, 1 << 20)
    seq.state[found] = found.begin(seq)
    found.propose([seq], [Budget(4, 4)])
    seq.tokens += [5, 6]
    short = TokenTree(np.array([1, 2], np.int32), np.zeros(1, np.int32), np.zeros(3, np.uint8))
    equal = TokenTree(np.array([3, 3], np.int32), np.array([-1, -1], np.int32), np.zeros(3, np.uint8))
    for tree in (None, short, equal, TokenTree.chain([9] * 99)):
        broken.tree = tree
        with pytest.raises((RuntimeError, ValueError)):
            found.propose([seq], [Budget(4, 4)])
    broken.tree = TokenTree.chain([1 << 30, 3])  # the engine refuses the whole tree afterwards
    (tree,) = found.propose([seq], [Budget(4, 4)])
    assert 1 << 30 in tree.tokens.tolist()
    broken.tree = TokenTree.chain(())
    (tree,) = found.propose([seq], [Budget(4, 4)])
    assert tree.tokens.tolist()[:1] == [7], "5 6 came before 7, so no token was lost"


def test_arrays_are_shared_with_the_python_form() -> None:
    assert loaded is not None
    made = parts("t")
    found = CompiledPlanner(bind(loaded.c), ["t"], made, CostModel())  # type: ignore[arg-type]
    weights = found.acceptance.weights
    found.acceptance.restore(([2.0] * len(weights), [0] * len(weights)))
    assert found.acceptance.weights is weights and np.asarray(weights).tolist() == [2.0] * len(weights)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slow_drafter_of_trees_stops_alone(compiled: bool) -> None:
    """Its time is its own: the others go on as beside a fast one."""
    stopped = {}
    for seconds in (0.003, 0.9):
        made = Traffic("ntc", compiled, 3, True, 0.02)
        made.planner.timer = lambda seconds=seconds, traffic=made: seconds * next(traffic.asked)  # type: ignore[misc]
        made.run(150)
        stopped[seconds] = [sum(name in names for *_, names, _ in made.log) for name in "ntc"]
    assert stopped[0.9][2] > len(made.log) // 2 > stopped[0.003][2]
    assert max(stopped[0.9][:2]) <= 1.2 * max(stopped[0.003][:2]), stopped
