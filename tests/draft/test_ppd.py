"""Rows that start from trained vectors: what the target makes of them, what is drafted from that, and that texts stay the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.sequence import Lanes, Request
from redraft.draft.ppd import PromptVectors, TextState
from redraft.engine.output import checked
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.models.trained import Trained, model_hash
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, Condition, check, drive, engine, prompts

HIDDEN, MANY = 32, 3
VECTORS = np.random.default_rng(7).standard_normal((MANY, HIDDEN)).astype(np.float32)


@cache
def text(options: str = "", backend: str = BACKEND, **about: Any) -> str:
    """The drafter with random vectors, for the tiny model."""
    folder = Path(mkdtemp())
    Trained("ppd", model_hash(engine("none", backend=backend).runner), about, {"vectors": VECTORS}).save(folder)
    return f"ppd:path={folder}{options}"


@pytest.mark.parametrize("options", ["", ",ranks=1,least=0.001"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 1, 0, 1, 0, 0), 5)])
def test_texts_are_those_of_the_definition(options: str, sampling: str, chunk: int, arrivals: tuple[int, ...], pool: int) -> None:
    seen = check(Condition(text(options), sampling, chunk=chunk, arrivals=arrivals, pool=pool))
    assert seen.rejected and (seen.preempted or pool > 5)


def test_texts_are_those_of_the_definition_with_numpy() -> None:
    lanes = (Lanes.SHARED, Lanes.PER_LAYER, Lanes.PER_HEAD)
    assert check(Condition(text(backend="numpy"), "sampled", "numpy", arrivals=(0, 3), lanes=lanes)).accepted


def test_offers_are_what_the_target_says_behind_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors as further tokens of the vocabulary, in a dense computation over the text and them alone."""
    spec, weights = plain.tiny()
    wide = replace(weights, embed=np.concatenate([np.asarray(weights.embed), VECTORS]))
    propose, seen = PromptVectors.propose, [0] * (MANY + 1)

    def looked(self: PromptVectors, seqs: Any, budgets: Any) -> Any:
        for seq in seqs:
            state: TextState = seq.state[self]
            seen[len(state.offers)] += 1
            for distance, offer in enumerate(state.offers):
                given = [*seq.tokens[:-1], *range(spec.vocab, spec.vocab + distance + 1)]
                wanted = plain.logits(replace(spec, vocab=spec.vocab + MANY), wide, given)[-1]
                assert list(offer.tokens) == np.argsort(-wanted[: spec.vocab], kind="stable")[: len(offer.tokens)].tolist()
        return propose(self, seqs, budgets)

    monkeypatch.setattr(PromptVectors, "propose", looked)
    drive(engine(text()), [Request(str(i), list(prompts()[i]), SAMPLING["greedy"]) for i in (0, 2)], (0, 0))
    assert seen[MANY] > 10, seen


def test_a_tree_holds_nodes_and_vectors_by_what_they_promise() -> None:
    made = engine(text())
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, PromptVectors)
    shown: list[Any] = []
    propose = drafter.propose

    def looked(seqs: Any, budgets: Any) -> Any:
        trees = propose(seqs, budgets)
        shown.extend(trees)
        for tree, budget in zip(trees, budgets, strict=True):
            tree.check(vocab=plain.VOCAB, rows=budget.rows, depth=budget.depth)
        return trees

    drafter.propose = looked  # type: ignore[method-assign]
    made.add(Request("a", list(prompts()[0]), SAMPLING["greedy"]))
    events = checked([event for _ in range(40) for event in made.step()])
    first, later = next(tree for tree in shown if len(tree)), [tree for tree in shown if tree.drafts]
    assert first.drafts == 0 and len(first.vectors) == MANY, "the newest token has all vectors"
    assert later and events[-1].stats.drafted == sum(tree.drafts for tree in shown), "a vector is no draft"
    assert later[0].parents.tolist()[later[0].drafts :][:MANY] == [-1, later[0].drafts, later[0].drafts + 1]
    assert len(later[0].vectors) > MANY, "drafts have vectors too"
    assert all(tree.child(node, 0) < tree.drafts for tree in later for node in range(-1, len(tree)))


def test_forks_continue_from_the_same_guesses() -> None:
    drafter = PromptVectors(registry.create("draft", "ppd:path=x"), VECTORS, plain.VOCAB)
    state = TextState([], 5)
    assert drafter.fork(state, None).length == 5  # type: ignore[arg-type]
    before = drafter.snapshot()
    drafter.rates.tries[0] += 9
    drafter.restore(before)
    assert drafter.snapshot() == before


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ppd", InvalidInput, "^ppd:path=none: must be a folder with trained vectors; make one with: redraft train MODEL --head ppd"),
        ("ppd:path=/nowhere", InvalidInput, "^ppd:path=/nowhere: no such file or folder"),
        ("ppd:path=x,least=2", InvalidInput, "least"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine(name)


def test_it_drafts_alone() -> None:
    with pytest.raises(Unsupported, match=r"^ppd: its rows start from vectors, so it drafts alone"):
        engine(f"union:parts=copyspec+({text()})")


def test_vectors_of_another_width_are_refused() -> None:
    folder = Path(mkdtemp())
    Trained("ppd", model_hash(engine("none").runner), {}, {"vectors": VECTORS[:, 1:]}).save(folder)
    with pytest.raises(CheckpointError, match=r"vectors is \[3, 31\], not \[3, 32\]"):
        engine(f"ppd:path={folder}")
