"""Accepts a drafted token where the target, with its own noise, draws the same one: the text of the plain loop.

Rules V1 and V2 of the drafting cards' verification.md: Miao et al., SpecInfer: Accelerating generative large language
model serving with tree-based speculative inference and verification, 2023, arXiv 2305.09781 (greedy and sampled match
over a tree); the noise that belongs to the position rather than to the step is what makes the text itself the same.

1. Draw the target's token at the last pending row, and then at each node that is reached.
2. Follow the child that carries it.
3. Where no child does, stop: the token is the bonus.

Differs: one draw per visited node, never one per root-to-leaf row, which would favour whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.tree import Kind, TokenTree
from redraft.verify.verifier import follow


@dataclass(frozen=True)
class Coupled:
    card: ClassVar[Card] = Card(
        title="Coupled",
        paper="Miao et al., SpecInfer, 2023, arXiv 2305.09781",
        guarantee=Guarantee.SAME_TEXT,
        deviates="noise is a function of seed and position, so that the text is the plain loop's, not only its distribution",
        summary="Accepts what the plain loop would draw; the default",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    drafts: ClassVar[Stream] = Stream.TARGET

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        roots = distribution.roots.tolist()
        return follow(
            trees, distribution, lambda reached: distribution.draw([roots[s] + 1 + node for s, node in reached.items()])
        )  # 1. to 3.
