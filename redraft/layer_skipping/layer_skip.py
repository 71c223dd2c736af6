"""Behind the prompt only some layers run: the first, the last and evenly spaced ones between, as many as a wanted speed-up leaves.

Yijin Liu, Fandong Meng, Jie Zhou: Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy,
2024, arXiv 2404.06954.

1. Of L layers keep n = floor(L / speedup), at least 2.
2. The first and the last are kept, and of those between every floor(L / (n - 1))-th from the bottom, until there are n.
3. The prompt runs all layers; each row behind it runs the kept ones, each on what the kept one before it returned.

Differs: nothing is fine-tuned here, so a model that was not trained for it loses quality quickly. The slots of skipped layers
stay allocated, because a page has room for all layers: time is saved and no memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.options import Options, number

ROUNDING = 1e-9  # 33 / 1.1 is 30 to a reader and a little less to a computer


@dataclass(frozen=True)
class UnifiedLayerSkipping(Options):
    """speedup: how many times fewer layers run behind the prompt; 1: all of them."""

    speedup: float = number(2.0, ge=1)

    card: ClassVar[Card] = Card(
        "Unified Layer Skipping",
        "Liu, Meng, Zhou, Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy, 2024, arXiv 2404.06954",
        Guarantee.LOSSY,
        needs="for quality, a model fine-tuned with the layers that it keeps",
        deviates="the slots of skipped layers stay allocated",
        summary="Skips layers after the prompt; for models tuned to it",
    )

    def open(self, runner: Any) -> Self:
        return self

    def layers(self, count: int) -> frozenset[int]:
        """The layers that run behind the prompt, of `count`. InvalidInput where the first and the last are not both left."""
        wanted = math.floor(count / self.speedup + ROUNDING)  # 1.
        if wanted == count:
            return frozenset(range(count))
        if wanted < 2:
            raise InvalidInput(
                f"layer-skip:speedup={self.speedup}: leaves {wanted} of {count} layers, and the first and the last must run;"
                f" 1 to {max(count / 2, 1):g} is allowed"
            )
        kept, interval = {0, count - 1}, count // (wanted - 1)  # 2.
        for layer in range(interval, count - 1, interval):
            if len(kept) < wanted:
                kept.add(layer)
        return frozenset(kept)  # 3. is Batch.layers
