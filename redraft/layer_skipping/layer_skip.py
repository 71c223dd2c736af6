"""After the prompt only some layers run: the first, the last and evenly spaced layers between, in a number set by the speed-up.

Yijin Liu, Fandong Meng, Jie Zhou: Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy,
2024, arXiv 2404.06954.

1. Of L layers keep n = floor(L / speedup), at least 2.
2. Keep the first layer, the last layer, and every floor(L / (n - 1))-th layer between them from the bottom, until there are n.
3. The prompt runs all layers. Each later row runs the kept layers, each on the output of the kept layer before it.

Differs: the model is not fine-tuned here, so a model that was not trained for layer skipping loses quality quickly. The method
saves time but no memory: a page has room for all layers, so the slots of skipped layers stay allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.layer_skipping.layer_skipping import SameLayers
from redraft.options import Options, number

ROUNDING = 1e-9  # 33 / 1.1 should be 30, but is a little less in floating point


@dataclass(frozen=True)
class UnifiedLayerSkipping(Options):
    """speedup: the factor by which fewer layers run after the prompt; 1: all layers run."""

    speedup: float = number(2.0, ge=1)

    card: ClassVar[Card] = Card(
        "Unified Layer Skipping",
        "Liu, Meng, Zhou, Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy, 2024, arXiv 2404.06954",
        Guarantee.LOSSY,
        needs="for quality, a model fine-tuned with the layers that it keeps",
        deviates="the slots of skipped layers stay allocated",
        summary="Skips layers after the prompt; for models tuned to it",
    )

    def open(self, runner: Any) -> SameLayers:
        count = len(runner.spec.layers)
        return SameLayers(self.layers(count), count)  # 3.

    def layers(self, count: int) -> frozenset[int]:
        """The layers that run after the prompt, of `count`. Raises InvalidInput if fewer than two layers would run."""
        wanted = math.floor(count / self.speedup + ROUNDING)  # 1.
        if wanted == count:
            return frozenset(range(count))
        if wanted < 2:
            raise InvalidInput(
                f"layer-skip:speedup={self.speedup}: leaves {wanted} of {count} layers, but the first and the last must run;"
                f" 1 to {max(count / 2, 1):g} is allowed"
            )
        kept, interval = {0, count - 1}, count // (wanted - 1)  # 2.
        for layer in range(interval, count - 1, interval):
            if len(kept) < wanted:
                kept.add(layer)
        return frozenset(kept)
