"""The first layers of the target draft, with a trained attention layer behind them; drafting stops when it becomes unsure.

Fangcheng Liu, Yehui Tang, Zhenhua Liu, Yunsheng Ni, Kai Han, Yunhe Wang: Kangaroo: Lossless Self-Speculative Decoding via Double Early
Exiting, 2024, arXiv 2404.18911.

1. The adapter reads the state h of a token behind the first layers: x = h + attention(norm(h)), which sees the tokens before it, then a
   norm. The rows of the target's head of `kept` tokens give the distribution of the next token.
2. Draft a chain: run the first layers on the newest token, over the target's own cache, then the adapter. Keys of drafted tokens are
   tentative rows.
3. Stop at `steps` tokens, or after a token with a probability below `eta`, which is drafted too.
4. Drop the tentative rows. Verification runs drafted rows through all layers, as without a draft.

Differs: verification does not go on from the states of the first layers, it computes these again. The head is trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Budget, Work
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, I32, TokenTree
from redraft.draft.follower import Draft, Follower, Limits
from redraft.draft.trained_file import TrainedFile
from redraft.draft.trained_layers import TrainedLayers, max_bytes
from redraft.errors import CheckpointError
from redraft.ops.arrays import Tensor
from redraft.options import number

METHOD = "kangaroo"


@dataclass(frozen=True)
class Kangaroo(TrainedFile):
    """path: a folder that `redraft train` wrote, or its file; steps: the most tokens a step; eta: the probability of a token below which
    drafting stops."""

    steps: int = number(6, ge=1)
    eta: float = number(0.6, ge=0)

    holds: ClassVar[str] = "a trained adapter"
    card: ClassVar[Card] = Card(
        "Kangaroo",
        "Liu, Tang, Liu, Ni, Han, Wang, Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, 2024, arXiv 2404.18911",
        Guarantee.SAME_TEXT,
        needs="an adapter that was trained for the model, once: redraft train",
        deviates="verification computes the first layers again; a trimmed head",
        summary="First layers with a trained adapter; deep models",
    )

    def max_bytes(self, runner: Any) -> int:
        return max_bytes(self, runner)

    def open(self, runner: Any, sampler: Any) -> Hopping:
        """Raises InvalidInput if the adapter is missing or was trained for another model, CheckpointError if it is damaged, OutOfMemory."""
        return Hopping(self, TrainedLayers.load(self, runner), runner, sampler)


class Hopping(Follower):
    """The opened form. A row of the adapter has the state of its own token."""

    lag = 0

    def __init__(self, method: Kangaroo, trained: TrainedLayers, target: Any, sampler: Any) -> None:
        count, most = trained.arrays.about.get("layer"), len(target.spec.layers) - 1
        if not isinstance(count, int) or not 1 <= count <= most:
            raise CheckpointError(f"{METHOD}:path={method.path}: an adapter behind layer {count}, 1 to {most} are allowed")
        super().__init__(target, trained, sampler, Limits(method.steps, 1, 1, sure=method.eta), count - 1)
        self.first = Layers.whole(range(count))

    def seen(self, hidden: Tensor) -> Tensor:
        return hidden

    def inputs(self, tokens: I32, states: Tensor) -> Tensor:
        return states

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A chain for each text. All tentative rows are dropped on return, also after an exception."""
        try:
            return super().propose(seqs, budgets)
        finally:
            for seq in seqs:
                self.target.memory.discard(seq)  # 4.

    def prepare(self, seqs: Seq[Sequence]) -> None:
        """Runs the first layers on the newest tokens. The target will compute the same states for them."""
        ready = [seq for seq in seqs if seq.pending == 1 and seq.state[self].end == len(seq.tokens) - 1]
        if ready:
            states = self._shallow([Work(seq, 1) for seq in ready], [EMPTY] * len(ready))
            for i, seq in enumerate(ready):
                self.note(seq.state[self], len(seq.tokens) - 1, states[i : i + 1])

    def states(self, levels: Seq[tuple[Draft, Seq[int]]]) -> Tensor:
        works = [Work(draft.seq, 1, len(draft.ran) - len(nodes)) for draft, nodes in levels]
        return self._shallow(works, [draft.running() for draft, _ in levels])

    def _shallow(self, works: list[Work], trees: list[TokenTree]) -> Tensor:
        """[n, hidden]: the states of tentative rows behind the first layers."""
        batch = Batch.pack(works, trees, self.target.memory.reserve(works, trees))
        layers: list[Layers | None] = [self.first.within(own) for own in batch.layers]
        out = self.target.forward(replace(batch, layers=layers, logit_rows=batch.logit_rows[:0]), Taps(frozenset({self.layer})))
        return out.hidden[self.layer]
