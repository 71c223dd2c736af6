"""The seam of verifiers: which path of each tree the target agrees with, and the bonus token behind it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from typing import ClassVar, Protocol

from redraft.card import Card
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.tree import F64, Kind, NoDistribution, TokenTree
from redraft.errors import Unsupported

Stages = Generator[float, None, F64]
"""A rule at one node: yields for each draw in turn the probability with which it is accepted, given that those before it
were rejected, and returns the distribution (of any sum) of the token where all are. Nothing random in it: so it can be enumerated."""


class Verifier(Protocol):
    """A frozen dataclass. `supports`: the kinds of children whose making it reverses without bias. `drafts`: the noise that a
    drafter which samples must draw with: the target's own, or a stream that is independent of it."""

    card: ClassVar[Card]
    supports: ClassVar[frozenset[Kind]]
    drafts: ClassVar[Stream]

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        """One Accepted per sequence; empty where distribution.roots is -1 (an unfinished chunk draws nothing)."""
        ...


def follow(trees: Seq[TokenTree], distribution: Distribution, tokens: Callable[[dict[int, int]], list[int]]) -> list[Accepted]:
    """From each root down, as long as a child carries the next token. `tokens` gives it for each of {sequence: the node that
    was reached, -1 the root}, in order."""
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
    """A verifier that tosses coins where children were sampled: a subclass gives the rule.

    Fixed children need no coin: the target draws a token and the child that carries it is followed (rule V2), and so a
    leaf's bonus and the whole text without a drafter are those of the plain loop.
    """

    supports: ClassVar[frozenset[Kind]]
    drafts: ClassVar[Stream] = Stream.DRAFT

    def stages(self, p: F64, q: F64, drawn: Seq[int], kind: Kind) -> Stages:
        """p: f64[V], the target's distribution; q: f64[V], the distribution the children were drawn from; drawn: their tokens in draw
        order,
        with repeats; `kind`: how they were made."""
        raise NotImplementedError

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        def tokens(reached: dict[int, int]) -> list[int]:
            rows = {s: int(distribution.roots[s]) + 1 + node for s, node in reached.items()}
            fixed = [s for s, node in reached.items() if trees[s].kinds[node + 1] == Kind.FIXED or not trees[s].drawn(node)]
            drawn = dict(zip(fixed, distribution.draw([rows[s] for s in fixed]), strict=True))
            return [drawn[s] if s in drawn else self._toss(trees[s], node, distribution, rows[s]) for s, node in reached.items()]

        return follow(trees, distribution, tokens)

    def _toss(self, tree: TokenTree, node: int, distribution: Distribution, row: int) -> int:
        """The next token: of the first child whose coin accepts it, else from the rule's residual."""
        kind, distributions = Kind(tree.kinds[node + 1]), tree.distributions
        if kind not in self.supports:
            raise Unsupported(f"verifier {type(self).__name__} cannot undo children made {kind.name}")
        assert distributions is not None, "sampled children without the distribution they were drawn from"
        draws = tree.tokens[tree.drawn(node)].tolist()
        try:
            (q,) = distributions.probs([node + 1])
        except NoDistribution:  # children of any making, drawn without the target's noise, may be matched: rule V2
            return distribution.draw([row])[0]
        (p,), (coins,) = distribution.probs([row]), distribution.uniform([row], len(draws))
        rule = self.stages(p, q, draws, kind)
        for token, coin in zip(draws, coins, strict=True):
            if coin < next(rule):
                return int(token)
        weights = residual(rule)
        if not weights.any():  # p and q differ by rounding only, and the coin fell on the last bit
            weights = p.copy()
            weights[draws] = 0
        return distribution.choose(row, weights if weights.any() else p)


def residual(rule: Stages) -> F64:
    """What a rule returns when every draw was rejected."""
    try:
        next(rule)
    except StopIteration as end:
        weights: F64 = end.value
        return weights
    raise AssertionError("a rule with more stages than draws")
