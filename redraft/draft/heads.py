"""Drafters that read the target's final state: small trained heads guess the tokens after the newest one.

The state is that of the last row that the target accepted, behind the final norm. It drew the newest token of the text, so heads begin with
the token after that. Features of heads end in the target's own LM head, cut to the tokens that the file keeps. At the start of a text,
after a preemption and after a rest there is no state, and nothing is drafted in that step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F32, F64, I64, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.template import Growth, HitRates, Offer
from redraft.draft.trained_file import TrainedFile
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained
from redraft.ops.arrays import Tensor, array, numpy_dtype
from redraft.ops.backend import Linear, LinearWeights, best_first
from redraft.options import number

if TYPE_CHECKING:
    from redraft.core.spec import ModelSpec
    from redraft.models.runner import Runner

RANKS = 8  # the most children of a node
QUARTER = 0.25  # of the likeliest sibling's probability


@dataclass(frozen=True)
class TrainedHeads(TrainedFile):
    """path: the folder or file of `redraft train`; nodes: draft the likeliest nodes, at most so many a text, none with less than a
    quarter of the probability of its likeliest sibling; none: the nodes whose ranks were right most often."""

    nodes: int | None = number(None, ge=0)

    holds: ClassVar[str] = "trained heads"

    def max_bytes(self, runner: Any) -> int:
        """The numbers of the file and the rows of the LM head, in the dtype of the model."""
        try:
            arrays = self.read().arrays
        except (CheckpointError, InvalidInput):
            return 0  # `open` says why
        size = numpy_dtype(runner.backend.dtype).itemsize
        kept = len(arrays.get("kept", ())) * runner.spec.hidden
        return int(size * (sum(one.size for one in arrays.values()) + kept))


class Arrays:
    """The arrays of a file, checked. path: where it is from, for errors."""

    def __init__(self, trained: Trained, path: Any, runner: Runner) -> None:
        self.path, self.about, self.arrays, self.backend = path, trained.about, trained.arrays, runner.backend
        self.dtype = numpy_dtype(runner.backend.dtype)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str, *shape: int) -> Any:
        """The array in the dtype of the model."""
        return self._found(name, shape).astype(self.dtype)

    def floats(self, name: str, *shape: int) -> F32:
        """The array in float32."""
        return np.asarray(self._found(name, shape).astype(np.float32))

    def packed(self, *weights: Any, gated: bool = False) -> LinearWeights:
        """One linear layer whose outputs are those of all weights, in order. gated: see Backend.pack."""
        joined = np.concatenate(weights) if len(weights) > 1 else weights[0]
        return self.backend.pack(Linear(self.backend.place(np.ascontiguousarray(joined))), gated)

    def counts(self) -> tuple[int, int]:
        """The numbers of heads and of blocks of each."""
        heads, blocks = (self.about.get(name, 1) for name in ("heads", "blocks"))
        if not (isinstance(heads, int) and isinstance(blocks, int) and heads > 0 and blocks > 0):
            raise CheckpointError(f"{self.path}: {heads} heads of {blocks} blocks: both must be integers above 0")
        return heads, blocks

    def kept(self, vocab: int) -> I64:
        """i64[k]: the tokens that can be drafted, ascending."""
        found = self.arrays.get("kept")
        if found is None:
            return np.arange(vocab)
        if found.ndim != 1 or not len(found) or found.min() < 0 or found.max() >= vocab or (np.diff(found.astype(np.int64)) <= 0).any():
            raise CheckpointError(f"{self.path}: kept must be ascending tokens below {vocab}")
        return found.astype(np.int64)

    def _found(self, name: str, shape: tuple[int, ...]) -> Any:
        found = self.arrays.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: has no array {name}")
        if found.shape != shape:
            raise CheckpointError(f"{self.path}: {name} is {list(found.shape)}, not {list(shape)}")
        return found


@dataclass(eq=False, slots=True)
class TextState:
    """The state of one request. row: f64[hidden], the final state that drew the last of `length` tokens; growth: the tree of this step."""

    row: F64 | None = None
    length: int = 0
    growth: Growth | None = None


class Heads(Stateless):
    """The opened form. depths: the number of heads; hidden: of a state."""

    def __init__(self, method: TrainedHeads, runner: Runner, vocab: int, depths: int, arrays: Arrays) -> None:
        self.method, self.runner, self.backend = method, runner, runner.backend
        self.hidden, self.depths, self.dtype = runner.spec.hidden, depths, arrays.dtype
        self.last = len(runner.spec.layers) - 1
        self.taps = Taps(hidden=frozenset({self.last}))
        self.kept = arrays.kept(vocab)
        whole = runner.weights.head
        if arrays.has("rows"):
            self.head = arrays.packed(arrays.get("rows", len(self.kept), self.hidden))
        else:
            self.head = self.backend.pack(whole.rows(self.kept)) if len(self.kept) < whole.outs else whole
        self.own_bytes = sum(one.size for one in arrays.arrays.values()) * self.dtype.itemsize
        self.own_bytes += 0 if self.head is whole else len(self.kept) * self.hidden * self.dtype.itemsize
        self.ranks = min(RANKS, len(self.kept))
        self.rates = HitRates(depths, self.ranks, arrays.about.get("rates", ()))

    @property
    def bytes(self) -> int:
        return int(self.own_bytes)

    # ---- one request

    def begin(self, seq: Sequence) -> TextState:
        return TextState()

    def fork(self, state: TextState, seq: Sequence) -> TextState:
        return TextState(state.row, state.length)

    # ---- one step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = [EMPTY] * len(seqs)
        drafting: list[tuple[int, Sequence, Growth]] = []
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            state: TextState = seq.state[self]
            state.growth = None
            rows = budget.rows if self.method.nodes is None else min(budget.rows, self.method.nodes)
            if state.row is not None and state.length == len(seq.tokens) and rows > 0 and budget.depth > 0:
                state.growth = Growth(rows, min(budget.depth, self.depths))
                drafting.append((i, seq, state.growth))
        if drafting:
            states = np.stack([seq.state[self].row for _, seq, _ in drafting])
            with self.backend.mode():
                self.grow([growth for _, _, growth in drafting], states, [seq.tokens[-1] for _, seq, _ in drafting])
            for i, _, growth in drafting:
                trees[i] = growth.tree()
        return trees

    @abstractmethod
    def grow(self, growths: Seq[Growth], states: F64, roots: Seq[int]) -> None:
        """Grows the tree of each text, whose state is f64[hidden] and whose newest token is the root."""

    def observe(self, result: StepResult) -> None:
        """Takes the state of the last accepted row of each text that drew a token, and learns which ranks were right."""
        batch, found = result.batch, []
        rows: list[int] = []
        for work, root, accepted in zip(result.work, batch.roots.tolist(), result.accepted, strict=True):
            state: TextState | None = work.seq.state.get(self)
            if state is None or not accepted.tokens:
                continue
            if state.growth is not None:
                self.rates.learn(state.growth, accepted.tokens)
                state.growth = None
            rows.append(root + 1 + accepted.path[-1] if accepted.path else root)
            found.append((state, len(work.seq.tokens)))
        if found:
            normed = self.runner.normed(result.out.hidden[self.last][batch.logit_rows[rows]])
            for (state, length), row in zip(found, normed, strict=True):
                state.row, state.length = row, length

    def snapshot(self) -> Any:
        return self.rates.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.rates.restore(snapshot)

    # ---- numbers

    def given(self, x: Any) -> Tensor:
        """An array as the backend computes with it."""
        return self.backend.place(np.ascontiguousarray(x, self.dtype))

    def product(self, x: Any, weights: LinearWeights) -> F32:
        """float32 [T, outs]"""
        return np.asarray(array(self.backend.linear(self.given(x), weights)).astype(np.float32))

    def embedded(self, tokens: Seq[int]) -> F32:
        """[T, hidden]: the rows of the embedding as stored, in the dtype of the model."""
        return array(self.backend.rows(self.runner.weights.embed, np.asarray(tokens, np.int32)))

    def offers(self, features: Any) -> list[Offer]:
        """What features [T, hidden] of heads offer."""
        spec = self.runner.spec
        logits = scaled(array(self.backend.logits(self.given(features), self.head)).astype(np.float32, copy=False), spec)
        places = best_first(logits, self.ranks)
        top = logits[np.arange(len(places))[:, None], places]
        shares = np.exp(top - top[:, :1]) / np.exp(logits - top[:, :1]).sum(1, keepdims=True)
        return [Offer(tokens, chances) for tokens, chances in zip(self.kept[places].tolist(), shares.tolist(), strict=True)]

    def weighed(self, depth: int, offer: Offer) -> tuple[list[float], list[float]]:
        """The values and the probabilities of offered tokens at this depth (0: below the root), by the rule of the method."""
        factor, least = self.rates.factor(depth), QUARTER * offer.chances[0]
        scores = [min(1.0, chance * factor) for chance in offer.chances]
        if self.method.nodes is None:
            return self.rates.rates(depth), scores
        return [score if chance >= least else 0.0 for score, chance in zip(scores, offer.chances, strict=True)], scores


def scaled(logits: F32, spec: ModelSpec) -> F32:
    """As sampling uses them."""
    if spec.logit_scale != 1.0:
        logits = logits * np.float32(spec.logit_scale)
    if spec.logit_softcap is not None:
        logits = np.tanh(logits / np.float32(spec.logit_softcap)) * np.float32(spec.logit_softcap)
    return logits


def sigmoid(x: F32) -> F32:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))  # exp overflows


def silu(x: F32) -> F32:
    return x * sigmoid(x)
