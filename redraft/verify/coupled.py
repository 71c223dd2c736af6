"""Accepts a drafted token if the target, with its own noise, draws the same token. The text is that of plain decoding.

Miao et al., SpecInfer: Accelerating generative large language model serving with tree-based speculative inference and
verification, 2023, arXiv 2305.09781 (greedy and sampled match over a tree). Noise is a function of the position, not of the
step, so not only the distribution but the text itself is the same.

1. Draw the target's token at the last pending row, and then at each node that is reached.
2. Follow the child that has this token.
3. If no child has it, stop: the token is the bonus token.

Differs: each visited node has one draw. One draw per root-to-leaf path would favour drafted tokens.
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
        deviates="noise is a function of seed and position, so the text itself is that of plain decoding, not only its distribution",
        summary="Accepts what plain decoding would draw; the default",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    drafts: ClassVar[Stream] = Stream.TARGET
    exact: ClassVar[bool] = True

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        roots = distribution.roots.tolist()
        return follow(
            trees, distribution, lambda reached: distribution.draw([roots[s] + 1 + node for s, node in reached.items()])
        )  # 1. to 3.
