"""The interface of verifiers: choose the accepted path of each tree and the bonus token after it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.tree import F64, Kind, NoDistribution, TokenTree
from redraft.errors import Unsupported

Stages = Generator[float, None, F64]
"""A rule at one node. It yields for each draw in turn the probability of its acceptance, given that the earlier draws were rejected.
It returns the distribution f64[V] (with any sum) of the token if all draws are rejected. A rule is deterministic, so tests can
enumerate its outcomes."""


class Verifier(Protocol):
    """A frozen dataclass. supports: the kinds of children that it can verify without bias; drafts: the noise stream for drafters that
    sample, either the target's own or an independent stream; exact: no tree changes a text, so trees may depend on anything.

    One that reads a trained file has `open(runner)`, which returns the verifier that runs. One that reads states has `taps`, the Taps
    whose layers Distribution.states gives."""

    card: ClassVar[Card]
    supports: ClassVar[frozenset[Kind]]
    drafts: ClassVar[Stream]
    exact: ClassVar[bool]

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        """One Accepted per sequence. It is empty if distribution.roots is -1: an unfinished prompt chunk draws no token."""
        ...


def opened(verifier: Verifier, runner: Any) -> Verifier:
    """The verifier that runs. Raises InvalidInput or CheckpointError if its file is missing or wrong."""
    found: Verifier = verifier.open(runner) if hasattr(verifier, "open") else verifier
    return found


def follow(trees: Seq[TokenTree], distribution: Distribution, tokens: Callable[[dict[int, int]], list[int]]) -> list[Accepted]:
    """Follows each tree from its root while a child has the next token. `tokens` maps {sequence: reached node, -1 is the root} to
    the next token of each of these sequences, in order."""
    paths: list[list[int]] = [[] for _ in trees]
    texts: list[list[int]] = [[] for _ in trees]
    reached = {s: -1 for s, root in enumerate(distribution.roots.tolist()) if root >= 0}
    while reached:
        for s, token in zip(list(reached), tokens(reached), strict=True):
            texts[s].append(token)
            reached[s] = trees[s].child(reached[s], token)
            if reached[s] >= 0:
                paths[s].append(reached[s])
            else:
                del reached[s]
    return [Accepted(tuple(path), tuple(text)) for path, text in zip(paths, texts, strict=True)]


class Rejecting:
    """Base class of verifiers that toss coins for sampled children. A subclass defines the rule.

    Fixed children need no coin: the target draws a token, and the child that has it is followed. So the bonus token at a leaf,
    and the whole text without a drafter, are those of plain decoding.
    """

    supports: ClassVar[frozenset[Kind]]
    drafts: ClassVar[Stream] = Stream.DRAFT
    exact: ClassVar[bool] = False

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        """The rule at one node. p: f64[V], the target distribution; q: f64[V], the draft distribution; drawn: the tokens of the
        children in draw order, with repeats; kind: how the children were drawn."""
        raise NotImplementedError

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        def tokens(reached: dict[int, int]) -> list[int]:
            rows = {s: int(distribution.roots[s]) + 1 + node for s, node in reached.items()}
            fixed = [s for s, node in reached.items() if trees[s].kinds[node + 1] == Kind.FIXED or not trees[s].drawn(node)]
            drawn = dict(zip(fixed, distribution.draw([rows[s] for s in fixed]), strict=True))
            return [drawn[s] if s in drawn else self._toss(trees[s], node, distribution, rows[s]) for s, node in reached.items()]

        return follow(trees, distribution, tokens)

    def _toss(self, tree: TokenTree, node: int, distribution: Distribution, row: int) -> int:
        """The next token: the first child that its coin accepts, otherwise a draw from the rule's residual. Raises Unsupported for
        children of a kind that the rule does not support."""
        kind, distributions = Kind(tree.kinds[node + 1]), tree.distributions
        if kind not in self.supports:
            raise Unsupported(f"verifier {type(self).__name__} does not support children of kind {kind.name}")
        assert distributions is not None, "sampled children need their draft distribution"
        draws = tree.tokens[tree.drawn(node)].tolist()
        try:
            (q,) = distributions.probs([node + 1])
        except NoDistribution:  # the children are independent of the target's noise, so the target's own draw is an exact rule
            return distribution.draw([row])[0]
        (p,), (coins,) = distribution.probs([row]), distribution.uniform([row], len(draws))
        rule = self.stages(p, q, draws, kind)
        for token, coin in zip(draws, coins, strict=True):
            if coin < next(rule):
                return int(token)
        weights = residual(rule)
        if not weights.any():  # p and q differ only by rounding, and the coin is at the last bit
            weights = p.copy()
            weights[draws] = 0
        return distribution.choose(row, weights if weights.any() else p)


def residual(rule: Stages) -> F64:
    """The value that a rule returns after every draw was rejected."""
    try:
        next(rule)
    except StopIteration as end:
        weights: F64 = end.value
        return weights
    raise AssertionError("a rule with more stages than draws")
