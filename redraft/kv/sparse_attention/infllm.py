"""Reads the blocks of the text whose most attended keys fit the query best, with all far keys at one distance.

Chaojun Xiao, Pengle Zhang, Xu Han, Guangxuan Xiao, Yankai Lin, Zhengyan Zhang, Zhiyuan Liu, Maosong Sun: InfLLM: Training-Free
Long-Context Extrapolation for LLMs with an Efficient Context Memory, 2024, arXiv 2402.04617.
`cut` after Qingfa Xiao, Jiachuan Wang, Haoyang Li, Cheng Deng, Jiaqi Tang, Shuangyin Li, Yongqi Zhang, Jun Wang, Lei Chen:
Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference, 2025, arXiv 2502.13542 (ActQKV).

1. A row scores keys that are `local` tokens or more before it as if all were exactly `local` before it. Distances in training then
   suffice for any length.
2. Add up the attention that each token gets. When it has left the `local` newest tokens, a block of `block` tokens is sealed: each head
   represents it by the mean of its `representatives` most attended keys, before their rotation.
3. The score of a block is the sum over query heads of the query, rotated to position `local`, times that mean. The heads of a layer
   read the same blocks.
4. A row reads the first `sinks` tokens, the `local` newest, those that are in no block yet, and the blocks with the largest scores, as
   many as `tokens` leaves room for. Rows of the context do so too.
5. With `cut` below 1 a layer reads the fewest blocks whose softmax of scores adds up to `cut`: few where one block stands out.

Differs: every row chooses by its own query, not by the mean or the probe query of a chunk, which would let a text depend on how it was
cut into steps; representatives are those of a kv head, by the attention over everything that is read, until the block is sealed; nothing is
offloaded. ActQKV's budget over layers needs all layers of the step before; here each layer cuts by its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.core.spec import Attention
from redraft.core.tree import F32, F64
from redraft.core.view import Far, Watch
from redraft.errors import InvalidInput
from redraft.kv.slots import Held
from redraft.kv.sparse_attention.sparse_attention import NoSideData, StatefulRead
from redraft.ops.arrays import Tensor, array, cast, device, namespace, turned, wide
from redraft.ops.backend import Products, WeightSums
from redraft.ops.format import PAGE, Arrays
from redraft.options import Options, number

METHOD = "infllm"


@dataclass(frozen=True)
class InfLLM(Options):
    """tokens: the tokens that a row reads, beside those that are in no block yet; local: the newest of them; sinks: the first of them;
    block: tokens of a block; representatives: the keys of a block whose mean represents it; cut: the part of the softmax of blocks that
    a layer reads.

    Measured on SmolLM2, a fact in 512 tokens of code, 256 of them read with blocks of 32: 3.2 nats a token of the answer more than with the
    first and newest 256 (StreamingLLM), and 1.5 less than with all; 1.0 less with representatives=32, the mean of a block.
    """

    tokens: int = 2048
    local: int = number(1024, ge=1)
    sinks: int = number(128, ge=0)
    block: int = number(128, ge=PAGE, multiple_of=PAGE)
    representatives: int = number(4, ge=1)
    cut: float = number(1.0, gt=0, le=1)

    card: ClassVar[Card] = Card(
        "InfLLM",
        "Xiao, Zhang, Han, Xiao, Lin, Zhang, Liu, Sun, InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient "
        "Context Memory, 2024, arXiv 2402.04617; Xiao, Wang, Li, Deng, Tang, Li, Zhang, Wang, Chen, Activation-aware Probe-Query: "
        "Effective Key-Value Retrieval for Long-Context LLMs Inference, 2025, arXiv 2502.13542",
        Guarantee.LOSSY,
        deviates="each row's own query chooses; attention until a block is sealed counts; layers cut blocks alone; no offloading",
        summary="Reads blocks of the far text; beyond the trained length",
        budget="tokens={tokens}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.sinks + self.local + self.block
        if self.tokens < least:
            raise InvalidInput(
                f"{METHOD}:tokens={self.tokens}: must be {least} or more, room for the first {self.sinks} tokens, the {self.local} newest"
                " and a block"
            )
        if self.representatives > self.block:
            raise InvalidInput(f"{METHOD}:representatives={self.representatives}: must be {self.block} or less, the tokens of a block")

    @property
    def blocks(self) -> int:
        return (self.tokens - self.sinks - self.local) // self.block

    def open(self, runner: Any) -> Blocks:
        return Blocks(self, runner.spec.attention)


@dataclass(frozen=True, eq=False)
class Blocks(StatefulRead):
    """The opened method."""

    options: InfLLM
    layers: tuple[Attention, ...]

    name: ClassVar[str] = METHOD
    watches = True

    @property
    def dense_up_to(self) -> int:
        few = self.options.blocks if self.options.cut == 1 else 1
        return self.options.sinks + self.options.local + (few + 1) * self.options.block

    @property
    def sync_every(self) -> int:
        return self.options.block

    @property
    def inside(self) -> int:  # type: ignore[override]
        return self.options.local

    @property
    def far(self) -> Far:  # type: ignore[override]
        return Far(self.options.local, self.options.local)  # 1.

    @property
    def skippable(self) -> int:  # type: ignore[override]
        return self.options.sinks

    def begin(self, seq: Sequence) -> Reader:
        return Reader(self)

    def fork(self, state: Reader, seq: Sequence) -> Reader:
        return replace(state)

    def border(self, state: Reader, seq: Sequence, held: Held, edited: bool) -> None:
        behind = seq.stored // self.sync_every * self.sync_every - self.options.local - self.options.sinks
        if (count := behind // self.options.block) > state.count:
            assert seq.stored % self.sync_every == 0, "attention behind the border was added"
            state.seal(count, held)

    def watch(self, seq: Sequence) -> tuple[Watch, ...]:
        return (Watch("mass"),)

    def observe(self, seq: Sequence, seen: WeightSums | None, rows: int, path: Seq[int]) -> None:
        if seen is not None:
            seq.state[self].watched(seen, seq.stored - len(path), path)


@dataclass(eq=False)
class Reader(NoSideData):
    """The sealed blocks of one text. count: their number; means: f32 [L, K, blocks, D]; first: the first token that is neither a sink nor
    in a block; mass: f64 [L K, tokens from `first` on]. Arrays are replaced, not changed, so forks may share them."""

    of: Blocks
    count: int = 0
    means: F32 | None = None
    mass: F64 = field(default_factory=lambda: np.zeros((1, 0)))

    @property
    def first(self) -> int:
        return self.of.options.sinks + self.count * self.of.options.block

    def watched(self, seen: WeightSums, end: int, path: Seq[int]) -> None:
        """Adds the attention of a commit. end: committed tokens before the path, whose node i had slot end + i."""
        chain, nodes = (array(part).astype(np.float64) for part in (seen.chain[0], seen.nodes[0, list(path)]))
        new = (chain + nodes.sum(0)).reshape(-1, chain.shape[-1])
        every, first = np.zeros((len(new), end + len(path))), self.first
        every[:, first : first + self.mass.shape[1]] = self.mass
        every[:, :end] += new[:, :end]
        for place, node in enumerate(path):
            every[:, end + place] += new[:, end + node]
        self.mass = every[:, first:]

    def seal(self, count: int, held: Held) -> None:
        """Seals blocks until there are `count`."""
        options, first = self.of.options, self.first
        size, end = options.block, options.sinks + count * options.block
        keys = np.concatenate([held.read(lane, first, end)[0] for lane in range(len(held.positions()))])  # [L K, tokens, D]
        keys = keys.reshape(len(self.of.layers), -1, *keys.shape[1:])
        back = -np.arange(first, end)
        plain = [k if layer.rotary is None else turned(k, layer.rotary.frequencies, back) for layer, k in zip(self.of.layers, keys)]
        mass = self.mass[:, : end - first].reshape(*keys.shape[:2], -1, size)
        most = np.argsort(-mass, axis=-1, kind="stable")[..., : options.representatives]
        parts = np.stack(plain).reshape(*mass.shape, -1)
        means = np.take_along_axis(parts, np.sort(most, -1)[..., None], -2).mean(-2, dtype=np.float64).astype(np.float32)  # 2.
        self.means = means if self.means is None else np.concatenate([self.means, means], 2)
        self.count, self.mass = count, self.mass[:, end - first :]

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, 1, R, n]"""
        if self.means is None:
            return seen[:, None]
        xp, options = namespace(q), self.of.options
        chosen = self._chosen(index, q, at, products)
        owner = (where - options.sinks) // options.block  # [K, n]
        sealed = (owner >= 0) & (owner < self.count)
        read = xp.permute_dims(chosen[:, xp.clip(owner, 0, self.count - 1)], (1, 0, 2))
        found: Tensor = (seen & (~sealed[:, None] | read))[:, None]  # 4.
        return found

    def _chosen(self, index: int, q: Tensor, at: Tensor, products: Products) -> Tensor:
        """bool [R, blocks]: the blocks that rows read."""
        xp, (heads, group, rows, size), layer = namespace(q), q.shape, self.of.layers[index]
        probe = q if layer.rotary is None else turned(q, layer.rotary.frequencies, self.of.options.local - at)
        assert self.means is not None
        means = cast(xp.asarray(self.means[index], device=device(q)), wide(q.dtype))
        each = products(probe.reshape(heads, group * rows, size), means).reshape(heads * group, rows, -1)
        scores = reduce(add, [each[h] for h in range(heads * group)])  # 3. in one order for any number of rows
        order = xp.argsort(scores, axis=-1, descending=True, stable=True)
        count: Any = self.of.options.blocks
        if self.of.options.cut < 1:  # 5.
            weights = xp.take_along_axis(scores * (layer.score_scale / (heads * group)), order, axis=-1)
            weights = xp.exp(weights - weights[..., :1])
            grown = xp.cumulative_sum(weights, axis=-1)
            needed = 1 + xp.sum(grown < self.of.options.cut * grown[..., -1:], axis=-1)
            count = xp.clip(needed, max=count)[:, None]
        found: Tensor = xp.argsort(order, axis=-1, stable=True) < count
        return found
