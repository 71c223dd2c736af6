"""Heads that know the tokens drafted so far: head i reads the final state and the embeddings of the tokens on its path.

Zachary Ankner, Rishab Parthasarathy, Aniruddha Nrusimha, Christopher Rinard, Jonathan Ragan-Kelley, William Brandon: Hydra:
Sequentially-Dependent Draft Heads for Medusa Decoding, 2024, arXiv 2402.05109. Bin Xiao, Chunan Shi, Xiaonan Nie, Fan Yang, Xiangwei
Deng, Lei Su, Weipeng Chen, Bin Cui: Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge, 2024, arXiv
2405.00263 (the cell, and the pruning that `nodes` chooses).

1. Head i reads concat(h, e(t1), .., e(ti)): h is the final state, t1 the newest token, the others drafted. Its first block is
   R x + SiLU(W x + b), further ones x + SiLU(W x + b). Its logits are those of the result in the LM head.
2. With a cell, s0 = h / g and s(i) = GRU(e(ti), s(i - 1)), with the gates reset, update and new as in PyTorch. The logits are those of
   g s(i). All depths share the cell; g is a vector.
3. All nodes of one depth that may have children run together. No further depth runs from which too little is expected.
4. Of all nodes the tree has those whose ranks were right most often, or the likeliest ones (template.py).

Differs: heads share the target's LM head, cut to frequent tokens. There is no prefix layer. The tree follows rates measured in use.
Clover's attention is a GRU.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import F32, F64
from redraft.draft.heads import Arrays, Heads, TrainedHeads, sigmoid, silu
from redraft.draft.template import Growth
from redraft.errors import Unsupported

WORTH = 0.04  # tokens that a further depth must promise: it costs about so much of a plain step


@dataclass(frozen=True)
class Hydra(TrainedHeads):
    card: ClassVar[Card] = Card(
        "Hydra heads",
        "Ankner, Parthasarathy, Nrusimha, Rinard, Ragan-Kelley, Brandon, Hydra: Sequentially-Dependent Draft Heads for Medusa "
        "Decoding, 2024, arXiv 2402.05109; Xiao, Shi, Nie, Yang, Deng, Su, Chen, Cui, Clover: Regressive Lightweight Speculative "
        "Decoding with Sequential Knowledge, 2024, arXiv 2405.00263",
        Guarantee.SAME_TEXT,
        needs="heads trained for the target: redraft train --head hydra",
        deviates="heads share the target's LM head, cut to frequent tokens; no prefix layer; Clover's attention is a GRU",
        summary="Heads that read the drafted tokens; better, and slower",
    )

    def open(self, runner: Any, sampler: Any) -> Heads:
        arrays = Arrays(self.load(runner), self.path, runner)
        if arrays.about.get("prefix"):
            raise Unsupported(f"hydra: {self.path} has a prefix layer, which is not supported; train with prefix=0")
        made = {"none": Mlps, "gru": Cells}.get(cell := arrays.about.get("cell", "none"))
        if made is None:
            raise Unsupported(f"hydra: {self.path} has cell={cell}; none and gru are supported")
        return made(self, runner, sampler.vocabulary.size, arrays)


class Chained(Heads):
    """Grows trees depth by depth. carried: what a node passes on to its children, f32[T, n]."""

    def grow(self, growths: Seq[Growth], states: F64, roots: Seq[int]) -> None:
        carried = states.astype(np.float32)
        rows = [{-1: i} for i in range(len(growths))]  # of `carried`, by node
        for depth in range(max(growth.depth for growth in growths)):
            best = self.rates.rates(depth)[0]
            nodes = [(i, node) for i, growth in enumerate(growths) if depth < growth.depth for node in growth.open(best)]
            hoped = sum(growths[i].values[node] * best if node >= 0 else 1.0 for i, node in nodes)
            if not nodes or hoped < WORTH * len(growths):  # 3.
                return
            above = [rows[i][node if node < 0 else growths[i].parents[node]] for i, node in nodes]
            tokens = [roots[i] if node < 0 else growths[i].tokens[node] for i, node in nodes]
            carried, features = self.step(depth, carried[above], self.embedded(tokens).astype(np.float32))
            for at, ((i, node), offer) in enumerate(zip(nodes, self.offers(features), strict=True)):
                rows[i][node] = at
                growths[i].extend(node, offer, *self.weighed(depth, offer))  # 4.

    def step(self, depth: int, carried: F32, embeddings: F32) -> tuple[F32, F32]:
        """What the nodes carry and the features f32[T, hidden] of their head. carried: of the parents; embeddings: of the tokens."""
        raise NotImplementedError


class Mlps(Chained):
    """Hydra's heads."""

    def __init__(self, method: Hydra, runner: Any, vocab: int, arrays: Arrays) -> None:
        depths, self.blocks = arrays.counts()
        super().__init__(method, runner, vocab, depths, arrays)
        size = self.hidden
        self.first, self.later = [], []
        self.biases = []
        for head in range(depths):
            name, wide = f"heads.{head}.blocks", size * (head + 2)
            both = (arrays.get(f"{name}.0.{part}", size, wide) for part in ("residual.weight", "weight"))
            self.first.append(arrays.packed(*both))
            self.later.append([arrays.packed(arrays.get(f"{name}.{block}.weight", size, size)) for block in range(1, self.blocks)])
            self.biases.append([arrays.floats(f"{name}.{block}.bias", size) for block in range(self.blocks)])

    def step(self, depth: int, carried: F32, embeddings: F32) -> tuple[F32, F32]:
        carried = np.concatenate([carried, embeddings], 1)
        y, biases = self.product(carried, self.first[depth]), self.biases[depth]
        x = y[:, : self.hidden] + silu(y[:, self.hidden :] + biases[0])  # 1.
        for weights, bias in zip(self.later[depth], biases[1:], strict=True):
            x = x + silu(self.product(x, weights) + bias)
        return carried, x


class Cells(Chained):
    """Clover's cell, one for all depths."""

    def __init__(self, method: Hydra, runner: Any, vocab: int, arrays: Arrays) -> None:
        depths, _ = arrays.counts()
        super().__init__(method, runner, vocab, depths, arrays)
        size = self.hidden
        self.gain = arrays.floats("cell.gain", size)
        self.weights = [arrays.packed(arrays.get(f"cell.{part}.weight", 3 * size, size)) for part in ("ih", "hh")]
        self.biases = [arrays.floats(f"cell.{part}.bias", 3 * size) for part in ("ih", "hh")]

    def step(self, depth: int, carried: F32, embeddings: F32) -> tuple[F32, F32]:
        size, before = self.hidden, carried / self.gain
        x, h = (
            self.product(*one) + bias for one, bias in zip(zip((embeddings, before), self.weights, strict=True), self.biases, strict=True)
        )
        reset, update = (sigmoid(x[:, a : a + size] + h[:, a : a + size]) for a in (0, size))
        new = np.tanh(x[:, 2 * size :] + reset * h[:, 2 * size :])
        carried = (update * before + (1 - update) * new) * self.gain  # 2.
        return carried, carried
