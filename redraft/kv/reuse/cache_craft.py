"""Reuses the cache that a chunk had inside an earlier prompt, and computes as many of its rows again as it depends on what is missing.

Shubham Agarwal, Sai Sundaresan, Subrata Mitra, Debabrata Mahapatra, Archit Gupta, Rounak Sharma, Nirmal Joshua Kapu, Tong Yu, Shiv Saini:
Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation, 2025, arXiv 2502.15734.

1. While a prompt is computed, see how much attention each token of a chunk gives to each earlier chunk, and to its own.
2. The chunk's dependence on its context, CCI, grows from 1/2 to 1 with the attention on earlier chunks, by that on its own.
3. For a new prompt, beta is the share of the attention on earlier chunks that went to those that stand before the chunk again; gamma is
   the share of pairs of these in another order. CFO = alpha CCI (1 - beta (1 - gamma)), at most 1, is the part of the chunk to compute.
4. Of the variants of a chunk, one for each earlier prompt, take the one with the lowest CFO. The tokens that gave most attention to
   earlier chunks run again.

Differs: variants have the bits of a computed prompt, so a prompt with a chunk that has no variant is computed as a whole, and all its
chunks get one; beta of a chunk that stood first is 0, unless it stands first again, else it would never be repaired; rows that the
question does not attend to are not left out in deeper layers; the oldest variants leave first; all caches are in memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.core.tree import F64, I32
from redraft.core.view import Watch
from redraft.kv.reuse.blend import fit, largest
from redraft.kv.reuse.reuse import AtOnce, Later, Pass, Repair, Seen, Span, Spliced
from redraft.ops.format import PAGE
from redraft.options import Options, number

ATTENTION = (Watch("mass", each=True),)
ROWS = 64  # that are watched at once
CHUNKS = 1024  # with variants, at most

Chunk = bytes  # its tokens
Key = tuple[str, Chunk, Chunk]  # salt, head, chunk


class Variant(NamedTuple):
    """The cache of a chunk in an earlier prompt, `source`, from position `first` on. before: the chunks before it; inter: the attention
    that it gave to each of them; impact: CCI; outward: f64[n], the attention of each of its tokens on earlier chunks."""

    source: list[int]
    first: int
    before: tuple[Chunk, ...]
    inter: tuple[float, ...]
    impact: float
    outward: F64

    def beta(self, before: Seq[Chunk]) -> float:
        """For a prompt with the chunks `before` in front."""
        if not self.before:
            return float(not before)
        return sum(mass for one, mass in zip(self.before, self.inter, strict=True) if one in before) / (sum(self.inter) or 1.0)

    def gamma(self, before: Seq[Chunk]) -> float:
        places = [before.index(one) for one in self.before if one in before]
        pairs = list(combinations(places, 2))
        return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0

    def part(self, before: Seq[Chunk], alpha: float) -> float:
        """CFO."""
        return min(1.0, max(0.0, alpha * self.impact * (1 - self.beta(before) * (1 - self.gamma(before)))))


def impact(inter: F64, intra: F64, lengths: Seq[int], length: int) -> float:
    """CCI of a chunk of `length` tokens after chunks of `lengths`. inter: [chunks, layers], its attention on these; intra: [layers], on
    its own."""
    a = (inter.sum(1) / inter.shape[1] / length / np.array(lengths)).sum() if len(lengths) else 0.0
    b = intra.mean() / length**2
    return float(1 / (1 + np.exp(-a / b))) if b else 1.0


@dataclass(frozen=True)
class CacheCraft(Options):
    """alpha: scales the part of a chunk that runs again; variants: of a chunk, at most."""

    alpha: float = number(0.5, ge=0, le=1000)
    variants: int = number(5, ge=1, le=64)

    card: ClassVar[Card] = Card(
        "Cache-Craft",
        "Agarwal et al., Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation, 2025, arXiv 2502.15734",
        Guarantee.LOSSY,
        needs="a prompt of segments; a model with rotary positions",
        deviates="chunks without a variant are computed with their prompt; no early end in deep layers; caches are in memory",
        summary="Chunks keep their cache from other prompts; for retrieval",
    )
    needs: ClassVar[str] = "segments"

    def open(self, runner: Any) -> Crafting:
        fit("cache-craft", runner)
        return Crafting(self)


class Crafting(AtOnce):
    """The opened method: the variants of chunks."""

    def __init__(self, method: CacheCraft) -> None:
        self.method = method
        self._variants: OrderedDict[Key, list[Variant]] = OrderedDict()

    def texts(self, request: Request) -> list[list[int]]:
        return []

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        """None of them if the prompt must be computed as a whole."""
        prompt, keys, found = request.prompt, _keys(request), []
        for i, (first, end) in enumerate(request.chunks):
            if end <= stored:
                continue
            before = [key[2] for key in keys[:i]]
            held = self._held(keys[i], end - first, cached)
            if not held:
                return []
            part, best = min(((one.part(before, self.method.alpha), one) for one in held), key=lambda pair: pair[0])  # 4.
            if part < 1:
                again = first + largest(best.outward, math.ceil(part * (end - first)))
                exact = best.first == first and best.source[:first] == prompt[:first]
                found.append(Span(first, best.first, end - first, exact, best.source, tuple(again.tolist())))
        return found

    def repair(self, text: Spliced) -> Repair:
        if not text.spans:
            yield from self._learn(text)
            return
        again = [row for span in text.spans if not span.exact for row in span.again if span.at <= row < span.at + span.length]
        yield Pass(np.array(again, np.int32))

    def _held(self, key: Key, length: int, cached: Callable[[Seq[int]], int]) -> list[Variant]:
        """The variants of a chunk that are in the cache, but for tokens in a page that is not full. Drops the others."""
        found = [one for one in self._variants.get(key, ()) if cached(one.source) > one.first + length - PAGE]
        if found:
            self._variants[key] = found
            self._variants.move_to_end(key)
        else:
            self._variants.pop(key, None)
        return found

    def _learn(self, text: Spliced) -> Generator[Pass | Later, Seen | None, None]:
        """Sees the attention of all chunks of a prompt that is computed as a whole, and enters its variants."""
        request, keys = text.request, _keys(text.request)
        made = []
        for i, (first, end) in enumerate(request.chunks):
            inter = np.zeros((i, text.layers))
            intra, outward = np.zeros(text.layers), np.zeros(end - first)
            yield Later(max(first, text.found))
            for at in range(max(first, text.found), end, ROWS):
                seen = yield Later(min(at + ROWS, end), ATTENTION)
                assert seen is not None
                mass = seen[0].astype(np.float64).mean(2)  # [rows, layers, slots]
                given = np.array([mass[..., a:b].sum(-1) for a, b in request.chunks[:i]]).reshape(i, *mass.shape[:2])
                inter += given.sum(1)
                intra += (1 - mass[..., :first].sum(-1)).sum(0)
                outward[at - first : at - first + len(mass)] = given.sum(0).mean(-1)
            lengths = [b - a for a, b in request.chunks[:i]]
            cci = impact(inter, intra, lengths, end - first)
            before = tuple(key[2] for key in keys[:i])
            made.append(Variant(request.prompt, first, before, tuple(inter.sum(1).tolist()), cci, outward))
        for key, one in zip(keys, made, strict=True):
            held = [other for other in self._variants.get(key, ()) if other.before != one.before]
            self._variants[key] = [*held, one][-self.method.variants :]
            self._variants.move_to_end(key)
        while len(self._variants) > CHUNKS:
            self._variants.popitem(last=False)


def _keys(request: Request) -> list[Key]:
    prompt = request.prompt
    head = _bytes(prompt[: request.chunks[0][0]]) if request.chunks else b""
    return [(request.salt, head, _bytes(prompt[first:end])) for first, end in request.chunks]


def _bytes(tokens: Seq[int]) -> bytes:
    found: I32 = np.asarray(tokens, np.int32)
    return found.tobytes()
