"""Reads the tokens with the highest scores by a codebook of keys, with all far keys at one distance.

Junhui He, Junna Xing, Nan Wang, Rui Xu, Shangyu Wu, Peng Zhou, Qiang Liu, Chun Jason Xue, Qingan Li: A2ATS: Retrieval-Based KV Cache
Reduction via Windowed Rotary Position Embedding and Query-Aware Vector Quantization, 2025, arXiv 2502.12665.

1. A row scores keys that are `window` tokens or more before it as if all were exactly `distance` before it. A far key then enters as
   it was before its rotation, and one codebook serves all positions.
Once for each model, layer and kv head:
2. Run texts. H is the mean of the outer products of the queries, rotated to position `distance`, over tokens and query heads.
3. With H = A A^T, k-means of the vectors A^T k of keys k before their rotation. The squared distance of A^T k to a center A^T c is
   (k - c)^T H (k - c), the mean squared error of the score.
During generation:
4. Each key gets the code of its nearest center.
5. The approximate score of a far token is the product of the query, rotated to position `distance`, and the vector c of its code.
   Behind the context a query head reads the first `sinks` tokens, the `window` newest, and those with the largest scores, `tokens` in
   all.

Differs: query heads choose apart; rows of the context read all keys, at these distances; a key gets its code at the next multiple of 32
tokens; nothing is offloaded; centers start at evenly spaced keys.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.core.spec import Attention
from redraft.core.tree import F32, F64
from redraft.core.view import Far
from redraft.errors import CheckpointError, InvalidInput
from redraft.kv.slots import Held
from redraft.kv.sparse_attention.sparse_attention import NoSideData, StatefulRead
from redraft.models import calibration
from redraft.models.trained import Trained, model_hash, place
from redraft.ops.arrays import Tensor, array, cast, device, dots, kth_largest, namespace, turned, wide
from redraft.ops.backend import Products
from redraft.ops.format import PAGE, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner

METHOD = "a2ats"
CODES = 256  # a code is a byte
PIECE = 512  # tokens of a text that run together
KEYS = 4096  # keys of a head that k-means sees
ROUNDS = 10

Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class A2ATS(Options):
    """tokens: the tokens that a query head reads; window: the newest of them, at their true distance; distance: that of all others; sinks:
    the first tokens, which are always read; profile: the file of a calibration, None for the place where `redraft calibrate` writes it.

    Measured on SmolLM2 with 512 tokens of code and distance=300: -0.05 nats a token by the distance alone, -0.06 with a quarter of the
    tokens read. The codes find 0.67 of the best 32 far tokens, a codebook for queries of all directions 0.55.
    """

    tokens: int = 256
    window: int = number(64, ge=PAGE)
    distance: int = number(2048, ge=1, le=1 << 20)
    sinks: int = number(4, ge=0)
    profile: Path | None = None

    card: ClassVar[Card] = Card(
        "A2ATS",
        "He, Xing, Wang, Xu, Wu, Zhou, Liu, Xue, Li, A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding "
        "and Query-Aware Vector Quantization, 2025, arXiv 2502.12665",
        Guarantee.LOSSY,
        needs="a calibration of the model, once: redraft calibrate --method a2ats",
        deviates="query heads choose apart; codes wait for a multiple of 32 tokens; no offloading",
        summary="Reads tokens by codes of their keys; long contexts",
        budget="tokens={tokens}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.sinks + self.window + 1
        if self.tokens < least:
            raise InvalidInput(
                f"{METHOD}:tokens={self.tokens}: must be {least} or more, room for the first {self.sinks} tokens, the {self.window} newest"
                " and one to choose"
            )

    def open(self, runner: Runner) -> Coded:
        """Raises InvalidInput if the profile is missing, belongs to another model or to another distance; CheckpointError if it is
        damaged."""
        path = self.profile.expanduser() if self.profile else place(METHOD, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no profile {path}; make one with: redraft calibrate {of} --method {METHOD} --texts FILE")
        books = Codebooks.load(path)
        Trained(METHOD, books.model, {}, {}).check(runner, path)
        if books.distance != self.distance:
            raise InvalidInput(f"{METHOD}:distance={self.distance}: {path} was made for distance {books.distance}")
        return Coded(self, books, runner.spec.attention)

    def calibrate(self, runner: Runner, texts: Seq[Seq[int]], samples: int = 256) -> Codebooks:
        """Token ids of texts -> Codebooks, for this distance. Long texts are cut into pieces of 512 tokens; of more than `samples` pieces
        it runs `samples`, evenly spaced. InvalidInput if there is no token."""
        return Codebooks.measured(runner, texts, samples, self.distance)


@dataclass(frozen=True, eq=False)
class Codebooks:
    """factors: f32 [L, K, D, D], the matrices A; vectors: f32 [L, K, codes, D], the vectors c; model: the hash of the calibrated model;
    texts, tokens: the number of texts and tokens of the calibration."""

    factors: F32
    vectors: F32
    distance: int
    model: str
    texts: int
    tokens: int

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `open` looks for it; returns its path."""
        about = {"texts": self.texts, "tokens": self.tokens, "distance": self.distance}
        arrays = {"factors": self.factors, "vectors": self.vectors}
        return Trained(METHOD, self.model, about, arrays).save(path or place(METHOD, self.model))

    @classmethod
    def load(cls, path: Path) -> Codebooks:
        """CheckpointError if the file is damaged or of another method."""
        found = Trained.load(path, METHOD)
        try:
            numbers = (int(found.about[name]) for name in ("distance", "texts", "tokens"))
            distance, texts, tokens = numbers
            return cls(found.arrays["factors"], found.arrays["vectors"], distance, found.model, texts, tokens)
        except KeyError as error:
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: {error}") from None

    @classmethod
    def measured(cls, runner: Runner, texts: Seq[Seq[int]], samples: int, distance: int) -> Codebooks:
        size = min(PIECE, runner.spec.context)
        pieces = [list(text[i : i + size]) for text in texts for i in range(0, len(text), size)]
        if not pieces or samples < 1:
            raise InvalidInput(f"{METHOD}: {len(pieces)} pieces of text and samples = {samples}: a calibration needs at least one of each")
        chosen = [pieces[i * len(pieces) // samples] for i in range(samples)] if len(pieces) > samples else pieces
        tokens = sum(map(len, chosen))
        step, moments, keys = -(-tokens // KEYS), dict[int, F64](), dict[int, list[F64]]()

        def add(index: int, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
            rows, own = (array(x).astype(np.float64) for x in (q, k))
            at = np.arange(len(own))
            if layer.rotary is not None:
                rows = turned(rows, layer.rotary.frequencies, (distance - at)[:, None])
                own = turned(own, layer.rotary.frequencies, -at[:, None])
            rows = rows.reshape(len(own), layer.kv_heads, -1, layer.head_dim)
            moments[index] = moments.get(index, 0.0) + np.einsum("tkgd,tkge->kde", rows, rows, optimize=True)  # 2.
            keys.setdefault(index, []).append(own[::step])

        calibration.run(runner, chosen, size, add)
        factors, vectors = [], []
        for index in sorted(moments):
            layer_keys = np.concatenate(keys[index]).swapaxes(0, 1)  # [K, tokens, D]
            made = [codebook(moment / tokens, own) for moment, own in zip(moments[index], layer_keys, strict=True)]
            factors.append([a for a, _ in made])
            vectors.append([c for _, c in made])
        return cls(np.array(factors, np.float32), np.array(vectors, np.float32), distance, model_hash(runner), len(texts), tokens)


def codebook(moment: F64, keys: F64, codes: int = CODES) -> tuple[F64, F64]:
    """H [D, D] and keys [n, D] -> A [D, D] and the vectors c [codes, D], fewer if there are fewer keys."""
    size = len(moment)
    a = np.linalg.cholesky(moment + np.eye(size) * max(1e-4 * np.trace(moment) / size, 1e-12))  # also for a singular H
    points = keys @ a
    centers = points[np.linspace(0, len(points) - 1, min(codes, len(points))).astype(int)]
    for _ in range(ROUNDS):  # 3.
        owner = nearest(points @ centers.T, centers)
        counts = np.bincount(owner, minlength=len(centers))
        sums = np.zeros_like(centers)
        np.add.at(sums, owner, points)
        centers = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
    return a, np.linalg.solve(a.T, centers.T).T


def nearest(products: F64, centers: F64) -> NDArray[np.int64]:
    """The index of the nearest center of each point, the lower of equal ones, from the products [points, centers] with it."""
    found: NDArray[np.int64] = ((centers**2).sum(-1) / 2 - products).argmin(-1)
    return found


@dataclass(frozen=True, eq=False)
class Coded(StatefulRead):
    """The opened method."""

    options: A2ATS
    books: Codebooks
    layers: tuple[Attention, ...]

    name: ClassVar[str] = METHOD
    sync_every: ClassVar[int] = PAGE

    @cached_property
    def centers(self) -> F64:
        """[L, K, codes, D]: the vectors A^T c."""
        return self.books.vectors.astype(np.float64) @ self.books.factors.astype(np.float64)

    @property
    def dense_up_to(self) -> int:
        return self.options.tokens

    @property
    def far(self) -> Far:  # type: ignore[override]
        return Far(self.options.window, self.options.distance)  # 1.

    def begin(self, seq: Sequence) -> Reader:
        return Reader(self)

    def fork(self, state: Reader, seq: Sequence) -> Reader:
        return replace(state)

    def border(self, state: Reader, seq: Sequence, held: Held, edited: bool) -> None:
        stored = seq.stored // PAGE * PAGE
        if edited or stored != state.stored:
            state.follow(stored, held, 0 if edited else state.stored)


@dataclass(eq=False)
class Reader(NoSideData):
    """The codes of one text. stored: the tokens with codes; codes: u8 [L, K, tokens], by position. It is replaced, not changed."""

    of: Coded
    stored: int = 0
    codes: Codes = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))

    def follow(self, stored: int, held: Held, first: int) -> None:
        """Gives codes to the tokens first..stored (exclusive) that have slots."""
        layers, heads = self.of.books.factors.shape[:2]
        codes = np.zeros((layers * heads, stored), np.uint8)
        codes[:, :first] = self.codes.reshape(layers * heads, -1)[:, :first] if first else 0
        lanes = held.positions()
        each = layers * heads // len(lanes)
        for lane, positions in enumerate(lanes):
            begin, end = np.searchsorted(positions, [first, stored]).tolist()
            keys, _ = held.read(lane, begin, end)
            for i, own in enumerate(keys):
                layer, head = divmod(lane * each + i, heads)
                codes[lane * each + i, positions[begin:end]] = self._coded(layer, head, own, positions[begin:end])
        self.stored, self.codes = stored, codes.reshape(layers, heads, stored)

    def _coded(self, layer: int, head: int, keys: F32, positions: NDArray[np.int32]) -> NDArray[np.int64]:
        """The codes of keys [n, D] at these positions."""  # 4.
        rotary, a, centers = (
            self.of.layers[layer].rotary,
            self.of.books.factors[layer, head].astype(np.float64),
            self.of.centers[layer, head],
        )
        own = keys.astype(np.float64)
        if rotary is not None:
            own = turned(own, rotary.frequencies, -positions)
        return nearest(dots(dots(own, a.T), centers), centers)  # in one order for any number of keys

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, G, R, n]"""
        xp, (heads, group, rows, size), options = namespace(q), q.shape, self.of.options
        rotary = self.of.layers[index].rotary
        probe = q if rotary is None else turned(q, rotary.frequencies, options.distance - at)
        vectors = cast(xp.asarray(self.of.books.vectors[index], device=device(q)), wide(q.dtype))
        table = products(probe.reshape(heads, group * rows, size), vectors).reshape(heads, group, rows, -1)
        codes = cast(xp.asarray(self.codes[index], device=device(q)), xp.int64)
        codes = xp.take_along_axis(codes, xp.clip(where, 0, self.stored - 1), axis=-1)  # [K, n]
        scores = xp.take_along_axis(table, xp.broadcast_to(codes[:, None, None], (heads, group, rows, codes.shape[-1])), axis=-1)  # 5.
        near = at[:, None] - where[:, None] < options.window  # [K, R, n]
        always = near | ((where < options.sinks) | (where >= self.stored))[:, None]
        scores = xp.where(seen[:, None], xp.where(always[:, None], inf, scores), -inf)
        last = kth_largest(scores, min(options.tokens, scores.shape[-1]))
        above, equal = scores > last, scores == last
        room = options.tokens - above.sum(-1)[..., None]  # of equal scores the lower slots
        found: Tensor = seen[:, None] & (above | (equal & (equal.cumsum(-1) <= room)))
        return found
