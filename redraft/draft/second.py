"""Drafters with a second model: its cache follows the target's text, and trees grow with one forward pass a level.

The second model has its own memory. While the target prefills a prompt, the second model reads the same tokens, one chunk a
step. After that the tree's nodes are the tentative rows of the second model, and the nodes that the target accepts are committed.
A drafter may give the second model a text of its own: another beginning (`_begins`), or tokens of another vocabulary (`_follow`,
`_offer`, `_landed`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from redraft.core.batch import Batch, PageView
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Sequence, Wants
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import EMPTY, F64, I64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler, Stateless
from redraft.draft.sketch import Sketch, TreeDrafter
from redraft.ops.arrays import array, largest, log_sum_exp

if TYPE_CHECKING:
    from redraft.models.runner import Runner

CHUNK = 512  # the most rows of text that the second model reads in a step
LIKELIEST = 128  # candidate tokens at each node at temperature 0, so also the most children of a node


@dataclass(eq=False, slots=True)
class DraftState:
    """The state of one request. seq: the sequence in the drafting model's memory; sketch: the tree of this step; packed: the number
    of its nodes that have run; work: the rows of text that ran before the tree; read: the number of the target's tokens that
    seq.tokens stands for."""

    seq: Sequence
    sketch: Sketch | None = None
    work: Work | None = None
    packed: int = 0
    read: int = 0


_numbers = itertools.count()


def mirror(seq: Sequence, tokens: Seq[int]) -> Sequence:
    """A copy of `seq` for the second model's memory, without prompt log-probabilities and other extra outputs. It has its own
    id, because several drafters can share the model."""
    request = seq.request
    if request.wants != Wants():
        request = replace(request, params=request.params.but(prompt_logprobs=None), wants=Wants())
    return Sequence(next(_numbers), request, seq.index, list(tokens), seq.prompt_len, seq.seed, sync_point=0)


@dataclass(frozen=True)
class SecondModel(TreeDrafter):
    """model: the draft model's folder, GGUF file or hub id; None: --draft-model, or the embedded draft model of the embedded target."""

    model: str | None = field(default=None, kw_only=True)

    def open(self, runner: Any, sampler: Any) -> SecondModelDrafter:
        from redraft.models.draft_model import load_draft_model  # imports torch, which `redraft methods` does not need

        return SecondModelDrafter(self, load_draft_model(runner, self.model), sampler)


class TreeGrower(Stateless):
    """Grows trees with a model, a second one or the target itself. The nodes are tentative rows in that model's memory."""

    def __init__(self, method: TreeDrafter, runner: Runner, sampler: DraftSampler) -> None:
        self.method, self.runner, self.sampler = method, runner, sampler
        self.memory = runner.memory
        self.kinds = frozenset({Kind.FIXED, method.kind})
        self.kept: I64 | None = None  # the tokens of the head's rows, if the head was trimmed

    @property
    def bytes(self) -> int:
        """The unpacked rows of a trimmed head. Models are shared and not counted."""
        return 0 if self.kept is None else len(self.kept) * self.runner.spec.hidden * self.runner.backend.dtype.itemsize

    def trim(self, keep: I64) -> None:
        """Restricts drafting to the tokens `keep` (ascending): the head keeps only their rows. Other users of the model keep
        the whole head."""
        whole = self.runner.weights
        if whole.head.meta:  # a model without data
            return
        keep = keep[keep < whole.head.outs]  # checkpoints of one vocabulary are padded to different sizes
        self.runner = copy(self.runner)  # same memory and layers
        self.runner.weights = replace(whole, head=self.runner.backend.pack(whole.head.rows(keep)))
        self.kept = keep

    def swap(self, weights: Any) -> None:
        """Drafts with other weights of the same shapes from now on. Other users of the model keep theirs."""
        assert self.kept is None, "the head is trimmed"
        self.runner = copy(self.runner)
        self.runner.weights = weights

    def _grow(self, growing: list[tuple[int, DraftState, Iterator[None]]]) -> None:
        """Grows all trees level by level, until every generator is exhausted or adds no node."""
        while growing:
            unfinished = []
            for one in growing:
                if next(one[2], one) is not one and len(one[1].sketch.tokens) > one[1].packed:  # type: ignore[union-attr]
                    unfinished.append(one)
            growing = unfinished
            if not growing:
                return
            states = [state for _, state, _ in growing]
            works = [Work(state.seq, state.work.rows, state.packed) for state in states if state.work is not None]
            trees = [state.sketch.tree() for state in states if state.sketch is not None]
            logits = self._forward(works, trees)
            assert logits is not None
            at = 0
            for state, tree in zip(states, trees, strict=True):
                assert state.sketch is not None
                for node in range(state.packed, len(tree)):
                    state.sketch.learn(node, *logits[at])
                    at += 1
                state.packed = len(tree)

    def _forward(self, works: list[Work], trees: list[TokenTree], *, wanted: bool = True) -> list[tuple[F64, float | None]] | None:
        """Runs tentative rows. Returns for each text's last token and each new node the logits f64[V] of the next token, minus
        infinity for tokens that are no candidates, and the log-sum-exp of all logits. The latter is None if the candidates alone
        normalise the distribution."""
        pages = self.memory.reserve(works, trees)
        out = self.runner.forward(self._pack(works, trees, pages), Taps(logits=True) if wanted else NO_TAPS)
        if not wanted:
            return None
        assert out.logits is not None
        vocab = self.sampler.vocabulary.size  # checkpoints of one vocabulary are padded to different sizes
        logits, candidates = out.logits[:, :vocab], self.method.candidates
        totals: list[float | None] = [None] * len(logits)
        places: I64 = np.arange(logits.shape[1])[None]
        if greedy := not candidates and all(work.seq.params.greedy for work in works):
            candidates = LIKELIEST
        if 0 < candidates < logits.shape[1]:
            if greedy:  # nothing is sampled, so probabilities only express confidence: keep them those of the whole vocabulary
                totals = list(log_sum_exp(logits))
            logits, places = largest(logits, candidates)
        rows = np.full((len(logits), vocab), -np.inf)
        np.put_along_axis(rows, places if self.kept is None else self.kept[places], array(logits).astype(np.float64), 1)
        return list(zip(rows, totals, strict=True))

    def _pack(self, works: list[Work], trees: list[TokenTree], pages: PageView) -> Batch:
        return Batch.pack(works, trees, pages)


class SecondModelDrafter(TreeGrower):
    """The opened form of every drafter with a second model. The state of a request is a DraftState."""

    # ---- one request

    def begin(self, seq: Sequence) -> DraftState:
        tokens, read = self._begins(seq)
        state = DraftState(self._mirror(seq, tokens), read=read)
        self._open(state.seq)
        return state

    def fork(self, state: DraftState, seq: Sequence) -> DraftState:
        self._forget(state)
        mirrored = self._mirror(seq, state.seq.tokens)
        if self.memory.available() < 1:  # a fork copies the partial page; without a free block the model reads the text again
            return self.begin(seq)
        self.memory.fork(state.seq, mirrored)
        return DraftState(mirrored, read=state.read)

    def end(self, state: DraftState) -> None:
        state.sketch = state.work = None
        self.memory.free(state.seq)

    # ---- one step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence that the second model has read completely. For the others it reads the next chunk."""
        trees = [EMPTY] * len(seqs)
        growing: list[tuple[int, DraftState, Iterator[None]]] = []
        works: list[Work] = []
        drafting: list[tuple[int, DraftState] | None] = []  # one for each of works; None: the text is not complete
        left, free = CHUNK, self.memory.available()
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            state: DraftState = seq.state[self]
            self._forget(state)
            mirrored = state.seq
            if not self._follow(state, seq):
                continue
            budget = self._budget(budget)
            depth = min(budget.depth, self.runner.spec.context - len(mirrored.tokens))
            rows = min(mirrored.pending, left)
            whole = rows == mirrored.pending and min(budget.rows, depth) > 0
            room = budget.rows if whole else 0
            while room and self.memory.need(mirrored, rows + room) > free:
                room //= 2
            need = self.memory.need(mirrored, rows + room)
            if not rows or depth < 0 or need > free or (whole and not room):
                continue
            left, free = left - rows, free - need
            works.append(Work(mirrored, rows))
            if whole:
                state.sketch = self._sketch(state, seq, Budget(room, depth))
                state.work, state.packed = works[-1], 0
            drafting.append((i, state) if whole else None)
        if not works:
            return trees
        complete = [work.done for work in works]  # read before the commit, which changes it
        logits = self._forward(works, [EMPTY] * len(works), wanted=any(drafting))
        read = [work for work, one in zip(works, drafting, strict=True) if one is None]
        self._commit(read, [Accepted()] * len(read))
        at = 0
        for done, one in zip(complete, drafting, strict=True):
            if one is not None:
                i, state = one
                assert state.sketch is not None and logits is not None
                state.sketch.learn(-1, *logits[at])
                growing.append((i, state, self.method.grow(state.sketch)))
            at += done
        self._grow(growing)
        for i, state, _ in growing:
            trees[i] = self._offer(state, budgets[i])
        return trees

    def observe(self, result: StepResult) -> None:
        """Commits the nodes that the target accepted, as far as the second model ran them."""
        works, kept = [], []
        for work, accepted in zip(result.work, result.accepted, strict=True):
            state: DraftState | None = work.seq.state.get(self)
            if state is None or state.work is None or state.sketch is None:
                continue
            path, read = self._landed(state, accepted.tokens[:-1])
            works.append(state.work)
            kept.append(Accepted(tuple(path), tuple(state.sketch.tokens[node] for node in path)))
            state.read += read
            state.sketch = state.work = None
        self._commit(works, kept)

    # ---- the second model's text

    def _begins(self, seq: Sequence) -> tuple[list[int], int]:
        """What the second model reads first, and the number of the target's tokens that this stands for."""
        return (seq.tokens, len(seq.tokens)) if self._knows(seq, seq.tokens) else ([], 0)

    def _mirror(self, seq: Sequence, tokens: Seq[int]) -> Sequence:
        return mirror(seq, tokens)

    def _follow(self, state: DraftState, seq: Sequence) -> bool:
        """Adds the target's new tokens to the second model's text. False if it cannot."""
        if not self._knows(seq, new := seq.tokens[state.read :]):
            return False
        state.seq.tokens += new
        state.read += len(new)
        return True

    def _budget(self, budget: Budget) -> Budget:
        """For the second model's own tree."""
        return budget

    def _sketch(self, state: DraftState, seq: Sequence, budget: Budget) -> Sketch:
        return Sketch(seq, budget, self.method.kind, self.sampler)

    def _offer(self, state: DraftState, budget: Budget) -> TokenTree:
        """The finished tree, in the target's tokens."""
        assert state.sketch is not None
        return state.sketch.tree()

    def _landed(self, state: DraftState, tokens: Seq[int]) -> tuple[list[int], int]:
        """The path of the second model's own nodes for the target's next tokens, as far as they ran, and how many of these tokens it stands
        for."""
        assert state.sketch is not None
        tree, node, path = state.sketch.tree(), -1, []
        for token in tokens:
            node = tree.child(node, token)
            if not 0 <= node < state.packed:
                break
            path.append(node)
        return path, len(path)

    def _open(self, mirrored: Sequence) -> None:
        """Opens a text with what the second model's prefix cache has of it."""
        self.memory.open(mirrored)
        try:
            if mirrored.tokens:
                self.memory.attach(mirrored, self.memory.match(mirrored.tokens, mirrored.request.salt))
        except BaseException:
            self.memory.free(mirrored)
            raise

    # ---- the second model

    def _knows(self, seq: Sequence, tokens: Seq[int]) -> bool:
        """Whether the model has embeddings for them: checkpoints of one vocabulary are padded to different sizes, and vectors in a prompt
        are the target's own."""
        return seq.request.vectors is None and max(tokens, default=0) < self.runner.spec.vocab

    def _commit(self, works: list[Work], accepted: list[Accepted]) -> None:
        if works:
            self.memory.move(self.memory.commit(works, accepted))
            for work in works:
                self.memory.publish(work.seq)

    def _forget(self, state: DraftState) -> None:
        """Drops the tentative rows of a step that raised."""
        self.memory.discard(state.seq)
        state.sketch = state.work = None
