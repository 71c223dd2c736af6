"""The drafter as the engine calls it: whatever it raises or proposes, the text goes on, plainly, and says why.

A draft decides nothing, so no fault of a drafter may end a request. A sequence whose drafter raised, or proposed what is
no tree within its budget, drafts no more; its `fault` names the drafter and what was wrong. Ctrl-C passes through.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F64, Kind, NoLaw, Probs, TokenTree
from redraft.draft.drafter import OpenDrafter

TOLERANCE = 1e-6  # of the sum of a law
LONGEST = 300  # letters of a fault: an absurd tree has an absurd description


class Guard:
    """An opened drafter, the number of tokens that it may choose from, and what it is called."""

    def __init__(self, drafter: OpenDrafter, vocab: int, name: str | None = None) -> None:
        self.drafter, self.vocab, self.name = drafter, vocab, name or type(drafter).__name__
        self.quiet: bool = getattr(drafter, "quiet", False)
        self.names: Seq[str] = getattr(drafter, "names", ()) or (self.name,)

    @property
    def taps(self) -> Taps:
        return self.drafter.taps

    def begin(self, seq: Sequence) -> None:
        if not seq.fault:
            try:
                seq.state[self.drafter] = self.drafter.begin(seq)
            except Exception as error:
                self._drop(seq, error)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        child.fault = seq.fault
        if not seq.fault:
            try:
                child.state[self.drafter] = self.drafter.fork(seq.state[self.drafter], child)
            except Exception as error:
                self._drop(child, error)

    def end(self, seq: Sequence) -> None:
        if self.drafter in seq.state:
            try:
                self.drafter.end(seq.state.pop(self.drafter))
            except Exception as error:
                self._drop(seq, error)

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence, within its budget. Where a batch raises, each is asked alone: one is at fault."""
        sound = [i for i, seq in enumerate(seqs) if not seq.fault and not self.quiet]
        trees = [EMPTY] * len(seqs)
        if not sound:
            return trees
        try:
            found = self.drafter.propose([seqs[i] for i in sound], [budgets[i] for i in sound])
            if len(found) != len(sound):
                raise ValueError(f"{len(found)} trees for {len(sound)} sequences")
        except Exception as error:
            if len(sound) == 1:
                self._drop(seqs[sound[0]], error)
            else:
                for i in sound:
                    (trees[i],) = self.propose([seqs[i]], [budgets[i]])
            return trees
        for i, tree in zip(sound, found, strict=True):
            if tree is EMPTY:
                continue
            try:
                self._check(tree, budgets[i])
                trees[i] = tree if tree.laws is None else replace(tree, laws=Told(self, seqs[i], tree.laws))
            except Exception as error:
                self._drop(seqs[i], error)
        return trees

    def observe(self, result: StepResult) -> None:
        """Where it raises, every sequence of the step that it drafts for does without: nobody knows which one it was."""
        try:
            self.drafter.observe(result)
        except Exception as error:
            for work in result.work:
                if self.drafter in work.seq.state:
                    self._drop(work.seq, error)

    def snapshot(self) -> Any:
        return self.drafter.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.drafter.restore(snapshot)

    def _check(self, tree: TokenTree, budget: Budget) -> None:
        tree.check(vocab=self.vocab, rows=budget.rows, depth=budget.depth)
        if unknown := {Kind(kind) for kind in tree.kinds.tolist()} - self.drafter.kinds - {Kind.FIXED}:
            raise ValueError(f"children made {', '.join(kind.name for kind in unknown)}, which it does not declare")
        if tree.origins is not None and (tree.origins.shape != tree.tokens.shape or (tree.origins >= len(self.names)).any()):
            raise ValueError(f"origins that are not one of {len(self.names)} parts for each node: {tree.origins.tolist()}")

    def told(self, seq: Sequence, laws: Probs, rows: Seq[int]) -> F64:
        """The laws at these rows, if they are laws; else the sequence drafts no more."""
        try:
            found = np.asarray(laws.probs(rows), np.float64)
            if found.shape != (len(rows), self.vocab) or not (found >= 0).all() or (np.abs(found.sum(1) - 1) > TOLERANCE).any():
                raise ValueError(f"what it drew from is no law over {self.vocab} tokens")
        except Exception as error:
            self._drop(seq, error)
            raise NoLaw from error
        return found

    def _drop(self, seq: Sequence, error: Exception) -> None:
        lines = f"{self.name}: {type(error).__name__}: {error}".splitlines()
        seq.fault = seq.fault or lines[0][:LONGEST]
        self.end(seq)


@dataclass(frozen=True, eq=False, slots=True)
class Told:
    """A tree's laws behind the guard: Probs."""

    guard: Guard
    seq: Sequence
    laws: Probs

    def probs(self, rows: Seq[int]) -> F64:
        return self.guard.told(self.seq, self.laws, rows)
