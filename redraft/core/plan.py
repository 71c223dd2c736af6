"""The decisions that a step makes before it runs, and its results."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from redraft.core.sequence import FinishReason, Rerun, Sequence
from redraft.core.tree import TokenTree

if TYPE_CHECKING:
    from redraft.core.batch import Batch
    from redraft.core.distribution import Distribution


class Work(NamedTuple):
    """`rows` pending tokens of `seq` run in this step. An earlier forward of the same tail packed the nodes before `first`, and the
    pending tokens too if the tail is not empty. rerun: committed rows that run instead; then rows is 0."""

    seq: Sequence
    rows: int
    first: int = 0
    rerun: Rerun | None = None

    @property
    def done(self) -> bool:
        """Whether the last pending token runs and the sequence draws a token after it. Valid until the commit."""
        return self.seq.stored + self.rows == len(self.seq.tokens) and self.seq.request.wants.new_tokens

    @property
    def prompt_rows(self) -> list[int]:
        """The rows that need logits because the request wants log-probabilities of the tokens after them. Valid until the commit."""
        seq, wants = self.seq, self.seq.request.wants
        first, last = seq.stored + 1, min(seq.stored + self.rows + 1, seq.prompt_len)  # tokens
        if wants.prompt_logprobs is None or first >= last:
            return []
        wanted = range(1, last) if wants.logprobs_of is None else wants.logprobs_of
        return [token - first for token in wanted[bisect_left(wanted, first) : bisect_left(wanted, last)]]


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
    """All results of a step, for drafters and policies that learn from them. `out` is the ForwardResult of the backend; proposed: the
    trees as the drafters made them, where constraints changed some."""

    work: list[Work]
    trees: list[TokenTree]
    batch: Batch
    accepted: list[Accepted]
    out: Any
    distribution: Distribution
    proposed: list[TokenTree] | None = None

    def own(self, s: int) -> tuple[TokenTree, tuple[int, ...]]:
        """The tree that the drafter of sequence s proposed, and the nodes of it that were accepted."""
        tree, accepted = self.trees[s] if self.proposed is None else self.proposed[s], self.accepted[s]
        if tree is self.trees[s]:
            return tree, accepted.path
        path: list[int] = []
        for token in accepted.tokens[: len(accepted.path)]:
            if (node := tree.child(path[-1] if path else -1, token)) < 0:
                break
            path.append(node)
        return tree, tuple(path)
