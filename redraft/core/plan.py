"""The decisions that a step makes before it runs, and its results."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from redraft.core.sequence import FinishReason, Sequence
from redraft.core.tree import TokenTree

if TYPE_CHECKING:
    from redraft.core.batch import Batch
    from redraft.core.distribution import Distribution


class Work(NamedTuple):
    """`rows` pending tokens of `seq` run in this step. An earlier forward of the same tail packed the nodes before `first`, and the
    pending tokens too if the tail is not empty."""

    seq: Sequence
    rows: int
    first: int = 0

    @property
    def done(self) -> bool:
        """Whether the last pending token runs and the sequence draws a token after it. Valid until the commit."""
        return self.seq.stored + self.rows == len(self.seq.tokens) and self.seq.request.wants.new_tokens


class Budget(NamedTuple):
    """At most `rows` drafted nodes, none deeper than `depth`."""

    rows: int
    depth: int


@dataclass(frozen=True)
class StepPlan:
    """The sequences that run, that are admitted (each with the number of prefix tokens to attach) and that are preempted."""

    work: list[Work]
    budgets: list[Budget]
    admit: list[tuple[Sequence, int]] = field(default_factory=list)
    preempt: list[Sequence] = field(default_factory=list)

    @property
    def seqs(self) -> list[Sequence]:
        return [w.seq for w in self.work]

    def only(self, seqs: Seq[Sequence]) -> StepPlan:
        """The plan with the work of `seqs` alone."""
        left = [i for i, w in enumerate(self.work) if w.seq in seqs]
        return StepPlan([self.work[i] for i in left], [self.budgets[i] for i in left], self.admit, self.preempt)


class Accepted(NamedTuple):
    """path: accepted nodes from the root down. tokens: those of the path and the bonus token; empty for an unfinished chunk."""

    path: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    reason: FinishReason | None = None


class StepResult(NamedTuple):
    """All results of a step, for drafters and policies that learn from them. `out` is the ForwardResult of the backend."""

    work: list[Work]
    trees: list[TokenTree]
    batch: Batch
    accepted: list[Accepted]
    out: Any
    distribution: Distribution
