"""Joins the caches of chunks that were computed apart, without a repair: later rows attend all chunks as one group.

Xinyu Yang, Tianqi Chen, Beidi Chen: APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding, 2025,
arXiv 2502.05431.

1. The head of the prompt stands before each chunk when its cache is computed. It draws the attention that the first tokens of a text get.
2. Attach the cache of each chunk at its place, keys rotated to their new positions. No chunk sees another one.
3. Rows after the last chunk, also those of new tokens, divide the scores of all keys in chunks by `temperature`. With L, the logarithm of
   the sum of the exponentials of these, the chunks as a whole weigh exp(scale * temperature * L); other keys weigh as usual.

Differs: chunks stand one after another, while the paper lets all begin at the same position; a chunk whose cache has left the memory
is computed in its place and sees the chunks before it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.kv.reuse.blend import fit
from redraft.kv.reuse.chunks import spans_of, texts_of
from redraft.kv.reuse.reuse import AtOnce, Repair, Span, Spliced
from redraft.options import Options, number


@dataclass(frozen=True)
class APE(AtOnce, Options):
    """temperature: below 1, the attention within chunks is sharper; scale: below 1, chunks as a whole get less of it. Both 1: chunks that
    do not see each other, and attention as usual."""

    temperature: float = number(0.9, gt=0, le=1)
    scale: float = number(0.9, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "APE",
        "Yang, Chen, Chen, APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding, 2025, arXiv 2502.05431",
        Guarantee.LOSSY,
        needs="a prompt of segments; a model with rotary positions",
        deviates="chunks have consecutive positions, not equal ones",
        summary="Chunks in any order keep their cache; nothing runs again",
    )

    needs: ClassVar[str] = "segments"

    @property
    def parallel(self) -> tuple[float, float]:
        return self.temperature, self.scale  # 3.

    def open(self, runner: Any) -> Self:
        fit("ape", runner)
        return self

    def texts(self, request: Request) -> list[list[int]]:
        return texts_of(request)

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        return spans_of(request)  # 1. and 2.

    def repair(self, text: Spliced) -> Repair:
        yield from ()
