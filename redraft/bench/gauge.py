"""Acceptance relative to the best possible acceptance: an untimed pass of `compare`.

Only for verifiers that test sampled drafts: the bound holds for drafts that are independent of the target's noise.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from redraft.card import Guarantee
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.tree import Kind, NoDistribution, TokenTree
from redraft.verify.bound import gauge
from redraft.verify.verifier import Rejecting

if TYPE_CHECKING:
    from redraft.llm import LLM

MAX_NODES = 200  # nodes that are examined, because one bound over a large vocabulary takes tens of milliseconds


@dataclass(frozen=True)
class Share:
    """Mean acceptance over mean bound, and its standard error."""

    ratio: float
    error: float


@dataclass
class Gauged:
    """A verifier that also records (acceptance, bound) at every `every`-th visited node with sampled children."""

    inner: Rejecting
    every: int = 1
    visited: int = 0
    found: list[tuple[float, float]] = field(default_factory=list)

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        accepted = self.inner.accept(trees, distribution)
        for root, tree, one in zip(distribution.roots.tolist(), trees, accepted, strict=True):
            for node in (-1, *one.path) if root >= 0 else ():
                kind, drawn = Kind(tree.kinds[node + 1]), tree.drawn(node)
                if kind is Kind.FIXED or not drawn or tree.distributions is None:
                    continue
                self.visited += 1
                if self.visited % self.every == 0 and len(self.found) < MAX_NODES:
                    try:
                        (p,), (q,) = distribution.probs([root + 1 + node]), tree.distributions.probs([node + 1])
                    except NoDistribution:
                        continue  # the statistics name a drafter that fails; it must not end the comparison
                    self.found.append(gauge(self.inner, p, q, tree.tokens[drawn].tolist(), kind))
        return accepted

    @property
    def share(self) -> Share | None:
        """None if nothing was sampled."""
        if len(self.found) < 2:
            return None
        own, bound = np.array(self.found).T
        ratio = own.mean() / bound.mean()
        return Share(ratio, float((own - ratio * bound).std(ddof=1) / bound.mean() / np.sqrt(len(own))))


def measured(llm: LLM, visits: int, run: Callable[[], object]) -> Share | None:
    """The acceptance of `llm`'s verifier over its bound in `run`, which generates and visits about `visits` nodes. None if it tests no
    sampled drafts or is lossy, because the bound is of lossless rules."""
    verifier: Any = llm.engine.verifier.own
    if verifier.drafts is not Stream.DRAFT or verifier.card.guarantee > Guarantee.SAME_DISTRIBUTION:
        return None
    gauged: Any = Gauged(verifier, every=max(1, visits // MAX_NODES))
    llm.engine.verifier.own = gauged
    try:
        run()
    finally:
        llm.engine.verifier.own = verifier
    share: Share | None = gauged.share
    return share
