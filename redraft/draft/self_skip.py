"""The target drafts with some of its own layers skipped, then verifies the draft with all layers.

Jun Zhang, Jue Wang, Huan Li, Lidan Shou, Ke Chen, Gang Chen, Sharad Mehrotra: Draft & Verify: Lossless Large Language Model
Acceleration via Self-Speculative Decoding, 2023, arXiv 2309.08168.

1. Choose the drafting layers once: the first, the last and evenly spaced layers between them.
2. Draft a chain with these layers, over the keys that the whole model stored in them. The keys of drafted rows are tentative
   rows after the text, in its own pages.
3. Stop at `length` tokens, or after a token if the estimated probability that some token is rejected exceeds `stop`.
4. Discard the tentative rows. Verification runs the same rows through all layers, as without a draft.

Differs: the paper finds the layers to skip by Bayesian optimisation on a sample text, and can skip attention and MLP of a layer
separately. Here whole layers are skipped, evenly spaced, without a search. The paper's threshold adapts to the measured acceptance
and uses the probability of one token. `stop` is fixed and uses the product of the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.batch import Batch, PageView
from redraft.core.layers import Layers
from redraft.core.plan import Budget, Work
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import DraftSampler
from redraft.draft.second import DraftState, TreeGrower
from redraft.draft.sketch import Sketch, TreeDrafter
from redraft.errors import InvalidInput
from redraft.options import number


class LayerDrafter(TreeDrafter):
    """Base class of drafters that run some of the target's layers."""

    def layers(self, count: int) -> frozenset[int]:
        """The layers, of a target with `count`. Raises InvalidInput if it has too few."""
        raise NotImplementedError


@dataclass(frozen=True)
class SelfSkip(LayerDrafter):
    """skip: the number of skipped layers, None: half of those between the first and the last; length: the most tokens a step; stop:
    the probability of a rejection above which drafting stops, 1: never."""

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
        """The drafting layers among `count` layers. Raises InvalidInput if `skip` leaves no room for the first and the last."""
        between = count - 2
        if between < 1 or (self.skip or 0) > between:
            allowed = f"0 to {between} is allowed" if between > 0 else "a target of 3 layers or more is needed"
            option = "" if self.skip is None else f":skip={self.skip}"
            raise InvalidInput(f"self-skip{option}: the target has {count} layers, and the first and the last always run; {allowed}")
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
    """The opened form of drafters that run some of the target's layers. It uses the target's model, memory and text, and keeps nothing
    between steps."""

    def __init__(self, method: LayerDrafter, runner: Any, sampler: DraftSampler) -> None:
        super().__init__(method, runner, sampler)
        self.layers = Layers.whole(method.layers(len(runner.spec.layers)))  # 1.

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A chain for each sequence that draws a token in this step. All tentative rows are discarded on return, also after an
        exception."""
        trees = [EMPTY] * len(seqs)
        growing: list[tuple[int, DraftState, Iterator[None]]] = []
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            if seq.pending == 1 and min(budget) > 0:
                sketch = Sketch(seq, budget, self.method.kind, self.sampler)
                growing.append((i, DraftState(seq, sketch, Work(seq, 1)), self.grow(sketch)))
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

    def grow(self, sketch: Sketch) -> Iterator[None]:
        return self.method.grow(sketch)

    def layers_of(self, seq: Sequence) -> Layers:
        """The layers that draft for this text."""
        return self.layers

    def _pack(self, works: list[Work], trees: list[TokenTree], pages: PageView) -> Batch:
        """A request with layer skipping has no keys in its skipped layers, so they cannot draft either."""
        batch = super()._pack(works, trees, pages)
        return replace(batch, layers=[self.layers_of(w.seq).within(own) for w, own in zip(works, batch.layers, strict=True)])
