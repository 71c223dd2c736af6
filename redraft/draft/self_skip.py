"""The target writes ahead with some of its own layers left out, and with all of them checks what it wrote.

Jun Zhang, Jue Wang, Huan Li, Lidan Shou, Ke Chen, Gang Chen, Sharad Mehrotra: Draft & Verify: Lossless Large Language Model
Acceleration via Self-Speculative Decoding, 2023, arXiv 2309.08168.

1. Choose the layers that draft, once: the first, the last and evenly spaced ones between.
2. Behind the text draft a chain with them, over the keys that the whole model stored in these layers. Keys of drafted rows
   go behind the text, in the tail of its own pages.
3. Stop at `length` tokens, or behind a token where the chance that some token so far is rejected exceeds `stop`.
4. Drop the tail. Verification runs the same rows through all layers as if nobody had drafted.

Differs: the paper searches for the layers to skip by Bayesian optimisation on a sample text, and may skip attention and MLP
of a layer separately; here whole layers are spaced evenly, without a search. Its threshold adapts to the measured acceptance
and looks at one token's probability; `stop` is fixed and looks at the product of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.batch import Batch, PageView
from redraft.core.plan import Budget, Work
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import DraftSampler
from redraft.draft.second import TreeGrower, DraftState
from redraft.draft.sketch import TreeDrafter, Sketch
from redraft.errors import InvalidInput
from redraft.options import number


@dataclass(frozen=True)
class SelfSkip(TreeDrafter):
    """skip: how many layers are left out, None: half of those between the first and the last; length: most tokens a step; stop:
    the chance of a rejection at which drafting stops, 1 never."""

    skip: int | None = number(None, ge=0)
    length: int = number(4, ge=1)
    stop: float = number(1.0, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "Self-speculation by skipping layers",
        "Zhang, Wang, Li, Shou, Chen, Chen, Mehrotra, Draft & Verify: Lossless Large Language Model Acceleration via "
        "Self-Speculative Decoding, 2023, arXiv 2309.08168",
        Guarantee.SAME_TEXT,
        needs="a target of 3 layers or more",
        deviates="skipped layers are spaced evenly instead of searched for; whole layers only; a fixed stopping rule",
        summary="The model without some layers; when no draft model fits",
    )
    kind: ClassVar[Kind] = Kind.SINGLE

    def layers(self, count: int) -> frozenset[int]:
        """The layers that draft, of `count`. InvalidInput where the first and the last are not both left."""
        between = count - 2
        if between < 1 or (self.skip or 0) > between:
            allowed = f"0 to {between} is allowed" if between > 0 else "a target of 3 layers or more is needed"
            asked = "" if self.skip is None else f":skip={self.skip}"
            raise InvalidInput(f"self-skip{asked}: the target has {count} layers, of which the first and the last always run; {allowed}")
        left = count - ((between + 1) // 2 if self.skip is None else self.skip)
        return frozenset(np.linspace(0, count - 1, left).round().astype(int).tolist())

    def grow(self, tree: Sketch) -> Iterator[None]:
        node, sure = -1, 1.0
        for more in reversed(range(min(self.length, tree.room))):
            distribution = tree.distribution(node)
            if (place := distribution.nth(0)) is None:
                return
            node = tree.add(node, place)
            sure *= float(np.exp(distribution.logq[place]))
            if not more or not tree.open(node) or 1 - sure > self.stop:  # 3.
                return
            yield

    def open(self, runner: Any, sampler: Any) -> Skipping:
        return Skipping(self, runner, sampler)


class Skipping(TreeGrower):
    """The opened form. It keeps nothing from step to step: its model, table and text are the target's."""

    def __init__(self, method: SelfSkip, runner: Any, sampler: DraftSampler) -> None:
        super().__init__(method, runner, sampler)
        self.layers = method.layers(len(runner.spec.layers))  # 1.

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A chain for each sequence that draws. Every tail is gone on return, also where something raises."""
        trees = [EMPTY] * len(seqs)
        growing: list[tuple[int, DraftState, Iterator[None]]] = []
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            if seq.pending == 1 and min(budget) > 0:
                sketch = Sketch(seq, budget, self.method.kind, self.sampler)
                growing.append((i, DraftState(seq, sketch, Work(seq, 1)), self.method.grow(sketch)))
        if not growing:
            return trees
        sketches = [(i, state.sketch) for i, state, _ in growing if state.sketch is not None]
        try:
            found = self._forward([Work(sketch.seq, 1) for _, sketch in sketches], [EMPTY] * len(sketches))  # 2.
            assert found is not None
            for (_, sketch), logits in zip(sketches, found, strict=True):
                sketch.learn(-1, *logits)
            self._grow(growing)
        finally:
            for _, sketch in sketches:
                self.memory.discard(sketch.seq)  # 4.
        for i, sketch in sketches:
            trees[i] = sketch.tree()
        return trees

    def _pack(self, works: list[Work], trees: list[TokenTree], pages: PageView) -> Batch:
        """A text that itself runs with fewer layers has no keys in the others."""
        batch = super()._pack(works, trees, pages)
        return replace(batch, layers=[self.layers if own is None else self.layers & own for own in batch.layers])
