"""Kangaroo's drafts against a dense computation of the first layers and its adapter over the whole text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.follower import Followed
from redraft.draft.kangaroo import Hopping
from redraft.draft.trained_layers import TrainedLayers
from redraft.errors import CheckpointError, InvalidInput
from tests.contracts.identity import SAMPLING, drive, engine, prompts
from tests.draft.test_eagle import Numbers, chances, states
from tests.draft.test_follower import LAYER, arrays, saved, text


class Checked(Hopping):
    """Compares each chain with the dense computation."""

    compared = deepest = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        numbers = Numbers("kangaroo")
        for seq, tree in zip(seqs, trees, strict=True):
            state: Followed = seq.state[self]
            if not state.whole:
                continue
            path, score = list[int](), 1.0
            for node, token in enumerate(tree.tokens.tolist()):
                rows = numbers.layer(states([*seq.tokens, *path], LAYER, final=False), mlp=False)
                expected = chances(numbers.logits(rows)[1][-1], seq, len(path))
                score *= float(expected[token])
                assert token == expected.argmax() and tree.scores is not None
                np.testing.assert_allclose(tree.scores[node], score, rtol=1e-4)
                path.append(token)
                self.compared += 1
            self.deepest = max(self.deepest, len(tree))
        return trees


def checked(runner: Any, sampler: Any) -> Checked:
    made = registry.create("draft", text("kangaroo", ",eta=0,steps=4"))
    return Checked(made, TrainedLayers.load(made, runner), runner, sampler)


@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 1, 3, 3), 40), (24, (0, 1, 0, 1, 0), 5)])
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_chains_are_those_of_a_dense_computation(sampling: str, chunk: int, arrivals: tuple[int, ...], pool: int) -> None:
    made = engine(checked, chunk=chunk, pool=pool)
    few = SAMPLING[sampling].but(max_tokens=12 if pool > 5 else 16)
    requests = [Request(str(i), list(prompts()[i]), few.but(seed=100 + i)) for i in range(len(arrivals))]
    seen = drive(made, requests, arrivals)
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Checked) and drafter.compared > 20 and drafter.deepest == 4
    assert seen.rejected and bool(seen.preempted) == (pool == 5)


def lengths(options: str, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Of the chains that the drafter proposes."""
    made = engine(text("kangaroo", f",{options}"))
    drafter, found = made.drafter.own.drafter, set[int]()
    propose = drafter.propose

    def looked(seqs: Any, budgets: Any) -> Any:
        trees = propose(seqs, budgets)
        found.update(len(tree) for tree, budget in zip(trees, budgets, strict=True) if budget.depth >= 4 and len(tree))
        assert all(tree.parents.tolist() == list(range(-1, len(tree) - 1)) for tree in trees)
        return trees

    monkeypatch.setattr(drafter, "propose", looked)
    drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    return found


def test_eta_decides_where_a_chain_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lengths("eta=0,steps=4", monkeypatch) == {4}
    assert lengths("eta=1.01,steps=4", monkeypatch) == {1}, "the first token is drafted whatever its probability"
    assert len(lengths("eta=0.5,steps=4", monkeypatch)) > 1


def test_bad_options_and_layers_are_refused() -> None:
    for option, message in (("steps=0", "steps=0: must be 1 or more"), ("eta=-1", "eta=-1.0: must be 0 or more")):
        with pytest.raises(InvalidInput, match=f"^kangaroo:{message}"):
            registry.create("draft", f"kangaroo:path=x,{option}")
    made, about = arrays("kangaroo")
    for layer in (0, 2, "one"):
        with pytest.raises(CheckpointError, match=f"an adapter behind layer {layer}, 1 to 1 are allowed"):
            engine(f"kangaroo:path={saved('kangaroo', made, {**about, 'layer': layer})}")
