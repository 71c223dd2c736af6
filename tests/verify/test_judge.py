"""The judge with given states, and in the engine with a file of random numbers."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.core.plan import Accepted
from redraft.core.tree import EMPTY, TokenTree
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained, model_hash
from redraft.verify.judge import Judging

PROMPTS = ["def add(a, b):", "class Stack:", "import os"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

#   root -> 0, 1;  0 -> 2, 3;  1 -> 5
TREE = TokenTree.build([0, 1, 2, 3, 5], [-1, -1, 0, 0, 1], vocab=8, rows=9, depth=9)
RUNNER: Any = SimpleNamespace(normed=lambda states: states)


class Written:
    """The token drawn at each row, the state there, and (row, token) that a processor forbids."""

    def __init__(self, roots, drawn, states, forbidden=()):
        self.roots, self.drawn, self.values, self.forbidden = np.asarray(roots, np.int32), drawn, states, forbidden

    def draw(self, rows):
        return [self.drawn[row] for row in rows]

    def states(self, rows, layer):
        assert layer == 3
        return np.array([[self.values[row]] for row in rows])

    def allows(self, row, token):
        return (row, token) not in self.forbidden


def judging(border: float) -> Judging:
    return Judging(RUNNER, 3, np.ones(1), 0.0, border)


def test_the_targets_token_first_then_the_best_that_passes() -> None:
    drawn = {0: 7, 1: 3, 2: 6, 3: 7, 4: 4, 5: 7}
    states = {1: 1.0, 2: 0.5, 3: 9.0, 4: 0.1, 5: 2.0}  # of nodes 0 to 4
    one = Written([0], drawn, states)
    assert judging(0.2).accept([TREE], one) == [Accepted((0, 3), (0, 3, 4))], "node 3 has the drawn token, whatever its score"
    assert judging(1.5).accept([TREE], one) == [Accepted((), (7,))]
    barred = Written([0], drawn, states, {(0, 0)})
    assert judging(0.2).accept([TREE], barred) == [Accepted((1, 4), (1, 5, 7))], "a forbidden token does not pass"
    assert judging(math.inf).accept([TREE], one) == [Accepted((), (7,))]
    assert len(judging(-math.inf).accept([TREE], one)[0].path) == 2
    assert judging(0.2).accept([TREE], Written([0], drawn, dict.fromkeys(states, math.nan))) == [Accepted((), (7,))]


def test_each_text_has_the_states_of_its_own_rows() -> None:
    chain = TokenTree.chain([1, 2])
    written = Written([4, -1, 0, 2], {4: 7, 5: 7, 0: 6, 2: 5, 3: 5}, {5: 1.0, 6: -1.0, 3: -1.0})
    assert judging(0.0).accept([chain, EMPTY, EMPTY, TokenTree.chain([3])], written) == [
        Accepted((0,), (1, 7)), Accepted(), Accepted((), (6,)), Accepted((), (5,)),
    ]  # fmt: skip


# ---- in the engine


@cache
def llm(verify: str = "coupled") -> LLM:
    return LLM("embedded", draft="ngram", verify=verify, dtype="float32", cache_memory=1 << 26, threads=1)


def ids(params: SamplingParams, verify: str) -> list[list[int]]:
    outputs = llm().generate(PROMPTS, params.but(verify=verify))
    assert not any(one.error or one.outputs[0].stats.fault for one in outputs)
    return [list(one.outputs[0].token_ids) for one in outputs]


def file(folder: Path, w: np.ndarray, b: float = 0.0, model: str | None = None) -> str:
    about = {"b": b}
    Trained("judge", model or model_hash(llm().runner), about, {"w": w.astype(np.float32)}).save(folder)
    return f"judge:path={folder}"


@pytest.mark.parametrize("params", [GREEDY, GREEDY.but(temperature=0.9, seed=3)])
def test_between_the_text_of_plain_decoding_and_every_draft(tmp_path: Path, params: SamplingParams) -> None:
    hidden = llm().runner.spec.hidden
    plain, every = ids(params, "coupled"), ids(params, "judge:t=0")
    assert ids(params, "judge:t=1") == plain != every
    assert ids(params, file(tmp_path / "no", np.zeros(hidden), -50.0)) == plain
    assert ids(params, file(tmp_path / "yes", np.zeros(hidden), 50.0)) == every


def test_the_judge_reads_the_state_behind_the_token(tmp_path: Path) -> None:
    """Its chance for a drafted token is the one of the text that ends with it."""
    made = llm()
    w = np.random.default_rng(2).standard_normal(made.runner.spec.hidden)
    found: list[tuple[list[int], np.ndarray]] = []
    judge = made.sibling(verify=file(tmp_path, w))
    own = judge.engine.verifier.own
    scores = own._scores

    def seen(trees: Any, distribution: Any) -> Any:
        out = scores(trees, distribution)
        for s, values in out.items():
            seq, nodes = distribution.work[s].seq, range(len(trees[s]))
            found.extend(([*seq.tokens, *trees[s].tokens[trees[s].path_to(node)].tolist()], values[node]) for node in nodes)
        return out

    object.__setattr__(own, "_scores", seen)
    judge.generate(PROMPTS, GREEDY)
    assert len(found) > 8
    states = made.embed([{"prompt_token_ids": text} for text, _ in found[:8]], normalize=False)
    np.testing.assert_allclose([value for _, value in found[:8]], [state @ w.astype(np.float32) for state in states], rtol=1e-3, atol=1e-3)


def test_a_wrong_file_is_refused_by_name(tmp_path: Path) -> None:
    hidden = llm().runner.spec.hidden
    with pytest.raises(InvalidInput, match="no judge is kept for this model; make one with: "):
        llm().generate("a", GREEDY.but(verify="judge"))
    with pytest.raises(InvalidInput, match="was made for the model with hash abc"):
        llm().sibling(verify=file(tmp_path / "other", np.zeros(hidden), model="abc"))
    with pytest.raises(CheckpointError, match=f"w of {hidden} numbers"):
        llm().sibling(verify=file(tmp_path / "short", np.zeros(3)))
    with pytest.raises(InvalidInput, match="judge:t=2"):
        llm().sibling(verify="judge:t=2")
