"""Statistics and provenance, compared with the trees that a drafter of this file made and with the accepted path."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.drafter import OpenDrafter
from redraft.draft.union import Merger
from redraft.engine.output import Event, Stats
from redraft.models.tokenizer import Decoder
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, decode, truth
from tests.engine.test_plugins import SAMPLED

TEXT = truth(SAMPLED, PROMPT, new=30)
KNOWN = {("r", 0): TEXT}


class Noted(RandomTrees):
    """Keeps each tree that it made, by the place of its first node in the text."""

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        MADE.update({seq.generated: tree for seq, tree in zip(seqs, trees, strict=True)})
        return trees


MADE: dict[int, TokenTree] = {}


def union(sampler: Any) -> OpenDrafter:
    class Kept(Merger):
        def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
            trees = super().propose(seqs, [Budget(min(6, rows), depth) for rows, depth in budgets])
            MADE.update({seq.generated: tree for seq, tree in zip(seqs, trees, strict=True)})
            return trees

    parts = [RandomTrees(plain.VOCAB, seed=4, right=0.5, known=KNOWN), RandomTrees(plain.VOCAB, seed=8, right=0.5, known=KNOWN)]
    return Kept(["first", "second"], parts, sampler)


def run(drafter: Any, **changes: Any) -> list[Event]:
    MADE.clear()
    made = engine(drafter, decode=Decoder(decode), decode_all=Decoder(decode))
    made.add(Request("r", list(PROMPT), SAMPLED.but(provenance=True, **changes)))
    events = []
    while made.has_work:
        events += made.step()
    assert made.memory.used() == 0
    return events


def check(events: list[Event], names: Seq[str]) -> Stats:
    stats, at, step, paths = events[-1].stats, 0, 0, []
    for event in events:
        assert len(event.provenance) == len(event.tokens) == len(event.drafted)
        tree = None
        for i, (token, one) in enumerate(zip(event.tokens, event.provenance, strict=True)):
            if one.tree is not None:  # the first of a step
                assert i == 0 and one.step == step + 1 and one.names == names
                step, tree = one.step, one.tree
                asked = MADE.get(at)
                assert tree is asked or (asked is None and not len(tree)), "the tree that was proposed there"
                paths.append((tree, one.path))
                assert len(one.path) == sum(event.drafted)
            assert tree is not None and one.step == step
            path = paths[-1][1]
            assert bool(one.drafter) == event.drafted[i] == (i < len(path))
            if event.drafted[i]:
                assert tree.tokens[path[i]] == token and tree.parents[path[i]] == (path[i - 1] if i else -1)
                assert one.drafter == names[0 if tree.origins is None else tree.origins[path[i]]]
            at += 1
    assert stats.steps == step == len(paths)
    assert stats.drafted == sum(len(tree) for tree, _ in paths) and stats.accepted == sum(len(path) for _, path in paths)
    assert stats.drafts == sum(len(tree) > 0 for tree, _ in paths)
    assert stats.by_depth == [sum(len(path) > depth for _, path in paths) for depth in range(max(len(path) for _, path in paths))]
    assert sum(stats.by_depth) == stats.accepted
    assert tuple(map(sum, zip(*stats.by_drafter.values(), strict=True))) == (stats.drafted, stats.accepted)
    for origin, name in enumerate(names):
        of = [np.zeros(len(tree)) if tree.origins is None else tree.origins for tree, _ in paths]
        checked = sum(int((found == origin).sum()) for found in of)
        kept = sum(int((found[list(path)] == origin).sum()) for found, (_, path) in zip(of, paths, strict=True) if path)
        assert stats.by_drafter[name] == (checked, kept) and kept
    return stats


def test_of_one_drafter() -> None:
    stats = check(run(Noted(plain.VOCAB, seed=4, right=0.8, known=KNOWN)), ("Noted",))
    assert stats.accepted > 10 and len(stats.by_depth) > 2


def test_of_a_union() -> None:
    stats = check(run(lambda runner, sampler: union(sampler)), ["first", "second"])
    assert stats.accepted > 5


@pytest.mark.parametrize("place", range(4, 12))
@pytest.mark.parametrize("end", ["token", "length", "string"])
def test_a_path_that_is_cut(end: str, place: int) -> None:
    """Nodes after the cut are not kept, so they count as drafted only."""
    if end == "string":
        text = decode(TEXT[: place + 1])
        changes: dict[str, Any] = {"stop": text[-1:]}
    else:
        changes = {"stop_token_ids": (TEXT[place],)} if end == "token" else {"max_tokens": place}
    events = run(Noted(plain.VOCAB, seed=4, right=1.0, known=KNOWN), **changes)
    tokens = [token for event in events for token in event.tokens]
    assert tokens == TEXT[: len(tokens)] and (end == "string" or len(tokens) <= place + 1)
    if any(event.stats.accepted for event in events):
        check(events, ("Noted",))
    assert not events[-1].drafted[-1], "the last token of a text is not stored"


def test_no_draft_has_none() -> None:
    events = run("none")
    assert all(one.drafter == "" and one.path == () and len(one.tree or ()) == 0 for event in events for one in event.provenance)
    assert events[-1].stats.drafts == 0 and not events[-1].stats.by_depth and not events[-1].stats.by_drafter


def test_a_copy_stays_as_it_is() -> None:
    stats = Stats()
    stats.count(TokenTree.chain([1, 2]), (0,), ("a",))
    copy = stats.copy()
    stats.count(TokenTree.chain([1, 2]), (0, 1), ("a",))
    assert (copy.by_depth, copy.by_drafter) == ([1], {"a": (2, 1)}) and (stats.by_depth, stats.by_drafter) == ([2, 1], {"a": (4, 3)})


class Strange(RandomTrees):
    """Gives its nodes origins that it does not name."""

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        from dataclasses import replace

        return [replace(tree, origins=np.full(len(tree), 3, np.uint16)) for tree in super().propose(seqs, budgets)]


def test_origins_without_names_are_a_fault_of_the_drafter() -> None:
    events = run(Strange(plain.VOCAB, seed=4, right=0.8, known=KNOWN))
    assert [token for event in events for token in event.tokens] == TEXT
    assert "origins" in events[-1].stats.fault
