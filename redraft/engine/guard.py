"""The drafter as the engine calls it. If a drafter raises or returns an invalid tree, the request continues without drafts.

Drafts do not decide the text, so a fault of a drafter need not end the request. `Sequence.fault` names the drafter and the error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F64, Kind, NoDistribution, Probs, TokenTree
from redraft.draft.drafter import OpenDrafter, Seconds
from redraft.engine.faults import SafeCalls

log = logging.getLogger(__name__)

TOLERANCE = 1e-6  # of the sum of a distribution, around 1
MAX_FAULT = 300  # characters of a fault; the description of an invalid tree may be very long


class Guard:
    """drafter: opened; vocab: number of token ids; name: in statistics; hidden: the width of the vectors that nodes may start from."""

    def __init__(self, drafter: OpenDrafter, vocab: int, name: str | None = None, hidden: int = 0) -> None:
        self.drafter, self.vocab, self.name, self.hidden = drafter, vocab, name or type(drafter).__name__, hidden
        self.never_drafts: bool = getattr(drafter, "never_drafts", False)
        self.names: Seq[str] = getattr(drafter, "names", ()) or (self.name,)
        self.safe = SafeCalls(self._drop)
        self._idle: Any = getattr(drafter, "idle", None)
        self._stopped: Any = getattr(drafter, "stopped", None)

    @property
    def taps(self) -> Taps:
        return self.drafter.taps

    @property
    def bytes(self) -> int:
        return getattr(self.drafter, "bytes", 0)

    def begin(self, seq: Sequence) -> None:
        if not seq.fault:
            self.safe.call(seq, self._begin, seq)

    def _begin(self, seq: Sequence) -> None:
        seq.state[self.drafter] = self.drafter.begin(seq)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        child.fault = seq.fault
        if not seq.fault:
            self.safe.call(child, self._fork, seq, child)

    def _fork(self, seq: Sequence, child: Sequence) -> None:
        child.state[self.drafter] = self.drafter.fork(seq.state[self.drafter], child)

    def end(self, seq: Sequence) -> None:
        if self.drafter in seq.state:
            self.safe.call(seq, self.drafter.end, seq.state.pop(self.drafter))

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence, within its budget."""
        trees = [EMPTY] * len(seqs)
        if self.never_drafts:
            return trees
        sound = [i for i, seq in enumerate(seqs) if not seq.fault]

        def ask(places: list[int]) -> list[TokenTree]:
            found = self.drafter.propose([seqs[sound[p]] for p in places], [budgets[sound[p]] for p in places])
            if len(found) != len(places):
                raise ValueError(f"{len(found)} trees for {len(places)} sequences")
            return found

        for i, tree in zip(sound, self.safe.call_each([seqs[i] for i in sound], ask) if sound else (), strict=True):
            if tree is not EMPTY and not seqs[i].fault:
                checked = self.safe.call(seqs[i], self._checked, tree, seqs[i], budgets[i])
                trees[i] = EMPTY if checked is None else checked
        return trees

    def observe(self, result: StepResult) -> None:
        if self.never_drafts:
            return
        drafting = (work.seq for work in result.work if self.drafter in work.seq.state)
        self.safe.call_for_all(drafting, self.drafter.observe, result)

    def idle(self, seconds: Seconds) -> bool:
        """See OpenDrafter. A drafter that raises is not asked again."""
        if self._idle is not None:
            try:
                return bool(self._idle(seconds))
            except Exception:
                log.warning("%s: times cannot be measured", self.name, exc_info=True)
                self._idle = None
        return False

    def stopped(self, seq: Sequence) -> Seq[str]:
        """See OpenDrafter."""
        return () if self._stopped is None or seq.fault else self.safe.call(seq, self._stopped, seq) or ()

    def snapshot(self) -> Any:
        return self.drafter.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.drafter.restore(snapshot)

    def _checked(self, tree: TokenTree | None, seq: Sequence, budget: Budget) -> TokenTree:
        if tree is None:
            raise ValueError("proposed None instead of a tree")
        tree.check(vocab=self.vocab, rows=budget.rows, depth=budget.depth)
        if tree.vectors is not None and tree.vectors.shape[1] != self.hidden:
            raise ValueError(f"vectors of {tree.vectors.shape[1]} numbers instead of {self.hidden}")
        if unknown := {*map(Kind, set(tree.kinds.tolist()))} - self.drafter.kinds - {Kind.FIXED}:
            raise ValueError(f"children made {', '.join(kind.name for kind in unknown)}, which are not in its declared kinds")
        origins = tree.origins
        if origins is not None and (origins.shape != tree.tokens.shape or max(origins.tolist(), default=0) >= len(self.names)):
            raise ValueError(f"origins: one below {len(self.names)} is needed for each node: {origins.tolist()}")
        return tree if tree.distributions is None else replace(tree, distributions=Guarded(self, seq, tree.distributions))

    def distributions(self, seq: Sequence, distributions: Probs, rows: Seq[int]) -> F64:
        """f64[rows, vocab]. Raises NoDistribution if they are invalid; the sequence then continues without drafts."""
        if (found := self.safe.call(seq, self._distributions, distributions, rows)) is None:
            raise NoDistribution
        return found

    def _distributions(self, distributions: Probs, rows: Seq[int]) -> F64:
        found = np.asarray(distributions.probs(rows), np.float64)
        if found.shape != (len(rows), self.vocab) or not (found >= 0).all() or (np.abs(found.sum(1) - 1) > TOLERANCE).any():
            raise ValueError(f"its draft probabilities are not a probability distribution over {self.vocab} tokens")
        return found

    def _drop(self, seq: Sequence, error: Exception) -> None:
        lines = f"{self.name}: {type(error).__name__}: {error}".splitlines()
        seq.fault = seq.fault or lines[0][:MAX_FAULT]
        self.end(seq)


@dataclass(frozen=True, eq=False, slots=True)
class Guarded:
    """The distributions of a tree, checked when a verifier requests them. Implements Probs."""

    guard: Guard
    seq: Sequence
    of: Probs

    def probs(self, rows: Seq[int]) -> F64:
        return self.guard.distributions(self.seq, self.of, rows)
