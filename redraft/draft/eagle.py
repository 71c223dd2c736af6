"""A small decoder layer guesses the target's next states, one after the other, and the target's head turns them into tokens.

Yuhui Li, Fangyun Wei, Chao Zhang, Hongyang Zhang: EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty, 2024,
arXiv 2401.15077. The tree: the same: EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, 2024, arXiv 2406.16858.

1. The row of token t joins its embedding with the target's state of token t - 1, behind the final norm: a linear layer, then one decoder
   layer of the target's form, which sees the rows before it, and a norm. The result stands for the state of token t.
2. The rows of the target's head of `kept` tokens give the distribution of token t + 1.
3. Draft level by level: the row of a drafted token has what stands for its parent's state. Of each level the `width` nodes with the
   likeliest paths get children, while the probabilities of these paths add up to `worth`.
4. Verify the likeliest paths within the budget. Rows of drafted tokens are dropped: accepted tokens are read again with true states.

Differs: the layer's output is normed, because states are; the head is trimmed; drafting stops by probability instead of at
a fixed depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.tree import I32
from redraft.draft.follower import Follower, Limits, normed
from redraft.draft.trained_file import TrainedFile
from redraft.draft.trained_layers import TrainedLayers, max_bytes
from redraft.ops.arrays import Tensor, namespace
from redraft.options import number

METHOD = "eagle"


@dataclass(frozen=True)
class Eagle(TrainedFile):
    """path: a folder that `redraft train` wrote, or its file; levels: the deepest drafted token; width: the nodes of a level that get
    children; least: the smallest probability of a path that is drafted; worth: tokens that a further level must promise, which costs
    about a tenth of a step."""

    levels: int = number(6, ge=1)
    width: int = number(4, ge=1)
    least: float = number(0.05, ge=0, le=1)
    worth: float = number(0.15, ge=0)

    holds: ClassVar[str] = "a trained head"
    card: ClassVar[Card] = Card(
        "EAGLE",
        "Li, Wei, Zhang, Zhang, EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty, 2024, arXiv 2401.15077; "
        "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, 2024, arXiv 2406.16858",
        Guarantee.SAME_TEXT,
        needs="a head that was trained for the model, once: redraft train",
        deviates="the layer's output is normed; a trimmed head; drafting stops by probability",
        summary="A trained layer guesses the next states; small batches",
    )

    def max_bytes(self, runner: Any) -> int:
        return max_bytes(self, runner)

    def open(self, runner: Any, sampler: Any) -> Drafting:
        """Raises InvalidInput if the head is missing or was trained for another model, CheckpointError if it is damaged, OutOfMemory."""
        return Drafting(self, TrainedLayers.load(self, runner), runner, sampler)


class Drafting(Follower):
    """The opened form."""

    def __init__(self, method: Eagle, trained: TrainedLayers, target: Any, sampler: Any) -> None:
        super().__init__(
            target,
            trained,
            sampler,
            Limits(method.levels, method.width, least=method.least, worth=method.worth),
            len(target.spec.layers) - 1,
        )
        hidden, arrays = target.spec.hidden, trained.arrays
        self.joint = arrays.packed(arrays.get("fc.weight", hidden, 2 * hidden))

    def seen(self, hidden: Tensor) -> Tensor:
        return normed(self.target, hidden)

    def inputs(self, tokens: I32, states: Tensor) -> Tensor:  # 1.
        backend = self.runner.backend
        embedded = backend.rows(self.target.weights.embed, tokens)
        return backend.linear(namespace(states).concat([states, embedded], axis=-1), self.joint)
