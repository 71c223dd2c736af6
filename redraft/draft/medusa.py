"""Several heads on one state: head k guesses the token k + 1 places after the newest one, whatever the tokens between.

Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao: Medusa: Simple LLM Inference Acceleration
Framework with Multiple Decoding Heads, 2024, arXiv 2401.10774.

1. Head k: z = h + SiLU(W h + b) of the final state h, then further blocks of the same form. Its logits are those of z in the LM head.
2. The likeliest tokens of head k are offered at depth k, below every node there.
3. Of all these nodes the tree has those whose ranks were right most often, or the likeliest ones (template.py).
4. After the step the state of the last accepted row is that of the next step.

Differs: heads share the target's LM head, cut to frequent tokens, instead of one matrix each. The tree is chosen from rates measured in
use, for any budget, instead of a calibration for 63 nodes. The newest token is drawn as without drafts, so any temperature is exact.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F64
from redraft.draft.heads import Arrays, Heads, TrainedHeads, silu
from redraft.draft.template import Growth


@dataclass(frozen=True)
class Medusa(TrainedHeads):
    card: ClassVar[Card] = Card(
        "Medusa heads",
        "Cai, Li, Geng, Peng, Lee, Chen, Dao, Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, "
        "2024, arXiv 2401.10774",
        Guarantee.SAME_TEXT,
        needs="heads trained for the target: redraft train --head medusa",
        deviates="heads share the target's LM head, cut to frequent tokens; the tree follows rates measured in use",
        summary="Heads that guess later tokens at once; one small product",
    )

    def open(self, runner: Any, sampler: Any) -> MedusaHeads:
        return MedusaHeads(self, runner, sampler.vocabulary.size, Arrays(self.load(runner), self.path, runner))


class MedusaHeads(Heads):
    """The opened form."""

    def __init__(self, method: Medusa, runner: Any, vocab: int, arrays: Arrays) -> None:
        depths, blocks = arrays.counts()
        super().__init__(method, runner, vocab, depths, arrays)
        size = self.hidden
        names = [[f"heads.{head}.blocks.{block}" for head in range(depths)] for block in range(blocks)]
        self.first = arrays.packed(*(arrays.get(f"{name}.weight", size, size) for name in names[0]))
        self.later = [[arrays.packed(arrays.get(f"{name}.weight", size, size)) for name in row] for row in names[1:]]
        self.biases = [np.stack([arrays.floats(f"{name}.bias", size) for name in row]) for row in names]

    def grow(self, growths: Seq[Growth], states: F64, roots: Seq[int]) -> None:
        depths = max(growth.depth for growth in growths)
        offers = self.offers(self.features(states)[:, :depths].reshape(-1, self.hidden))  # 2.
        for i, growth in enumerate(growths):
            growth.every = offers[i * depths : i * depths + growth.depth]
            for depth, offer in enumerate(growth.every):  # 3.
                values, scores = self.weighed(depth, offer)
                for node in growth.open(values[0]):
                    growth.extend(node, offer, values, scores)

    def features(self, states: F64) -> Any:
        """f32[T, depths, hidden]"""
        count = len(states)
        x = states.astype(np.float32)
        found = x[:, None] + silu(self.product(x, self.first).reshape(count, self.depths, -1) + self.biases[0])  # 1.
        for heads, bias in zip(self.later, self.biases[1:], strict=True):
            parts = [self.product(found[:, head], weights) for head, weights in enumerate(heads)]
            found = found + silu(np.stack(parts, 1) + bias)
        return found
