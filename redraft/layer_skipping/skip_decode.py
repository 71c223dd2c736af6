"""The further a text is generated, the fewer layers run: the lowest and, of those above, the highest ones, in a number that falls.

Luciano Del Corro, Allie Del Giorno, Sahaj Agarwal, Bin Yu, Ahmed Awadallah, Subhabrata Mukherjee: SkipDecode: Autoregressive Skip
Decoding with Batching and Caching for Efficient LLM Inference, 2023, arXiv 2307.02628.

1. The prompt runs all layers.
2. Row t behind it (t = 0, 1, ...) runs n(t) layers: from `most` down to `least` in a straight line over `over` rows, then `least`.
3. These are the layers 0 .. warm - 1 and the last n(t) - warm layers. The state after layer warm - 1 goes straight into the first of
   these. As n never grows, each row finds the keys of all rows before it in every layer that it runs.

Differs: the model is not fine-tuned here, so a model that was not trained for the schedule loses quality quickly. The length of the
line is an option, not the request's max_tokens, so the first tokens of a text do not depend on how long it may get. The slots of
skipped layers stay allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.layers import Layers
from redraft.core.sequence import UNLIMITED, Sequence
from redraft.errors import InvalidInput
from redraft.layer_skipping.layer_skipping import StatelessLayerSkipping
from redraft.options import Options, number


@dataclass(frozen=True)
class SkipDecode(Options):
    """most, least: the layers of the first and of the last rows, None: all, and half of them; warm: the lowest layers, which always run;
    over: the rows in which the number falls."""

    most: int | None = number(None, ge=2)
    least: int | None = number(None, ge=2)
    warm: int = number(1, ge=1)
    over: int = number(256, ge=1)

    card: ClassVar[Card] = Card(
        "SkipDecode",
        "Del Corro, Del Giorno, Agarwal, Yu, Awadallah, Mukherjee, SkipDecode: Autoregressive Skip Decoding with Batching and Caching "
        "for Efficient LLM Inference, 2023, arXiv 2307.02628",
        Guarantee.LOSSY,
        needs="for quality, a model fine-tuned with the schedule",
        deviates="the number falls over a fixed number of rows; the slots of skipped layers stay allocated",
        summary="Ever fewer layers along a text; for models tuned to it",
    )

    def open(self, runner: Any) -> Schedule:
        return Schedule(self, len(runner.spec.layers))


class Schedule(StatelessLayerSkipping):
    """The opened form, for a model with `count` layers. Raises InvalidInput if the options do not fit this number."""

    def __init__(self, method: SkipDecode, count: int) -> None:
        self.count, self.warm, self.over = count, method.warm, method.over
        self.most = count if method.most is None else method.most
        self.least = max(min(self.warm + 1, count), (count + 1) // 2) if method.least is None else method.least
        least = min(self.warm + 1, count)
        for name, value, low, high in (("most", self.most, least, count), ("least", self.least, least, self.most)):
            if not low <= value <= high:
                raise InvalidInput(
                    f"skip-decode:{name}={value}: the target has {count} layers, and the lowest {self.warm} and the last one always run;"
                    f" {low} to {high} is allowed"
                )
        self.skips = self.least < count
        self._layers = cache(self._made)

    def number(self, t: int) -> int:
        """Of layers that row t behind the context runs."""
        fallen = (self.most - self.least) * min(t, self.over)
        return (2 * (self.most * self.over - fallen) + self.over) // (2 * self.over)  # 2., rounded

    def plan(self, seq: Sequence) -> Layers:
        return self._layers(self.number(seq.stored - seq.context))

    def border(self, seq: Sequence) -> int:
        now, falls = self.number(seq.stored - seq.context), self.most - self.least
        if now == self.least:
            return UNLIMITED
        # the first t whose exact number is below now - 1/2
        return seq.context + (2 * self.over * (self.most - now) + self.over) // (2 * falls) + 1

    def _made(self, number: int) -> Layers:
        return Layers.whole((*range(self.warm), *range(self.count - number + self.warm, self.count)))  # 3.
