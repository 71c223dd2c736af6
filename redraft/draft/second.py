"""A second model's cache, kept level with the text, and the growing of trees on a model, one forward pass a level.

The second model has its own memory. Its text follows the target's: what is pending there runs first, a chunk at a time, while
the target reads the prompt. After that the tree is the tail, and what the target accepted of it is committed.
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
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import EMPTY, F64, I64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler, Stateless
from redraft.draft.sketch import TreeDrafter, Sketch

if TYPE_CHECKING:
    from redraft.models.runner import Runner

CHUNK = 512  # rows of text that a step reads at most
LIKELIEST = 128  # tokens that are looked at behind a node at temperature 0, and the most children that it can get there


@dataclass(eq=False, slots=True)
class DraftState:
    """One text as the drafting model's table holds it. sketch, packed: the tree whose first nodes are its tail; work: how
    its tail began."""

    seq: Sequence
    sketch: Sketch | None = None
    work: Work | None = None
    packed: int = 0


_numbers = itertools.count()


def mirror(seq: Sequence, tokens: Seq[int]) -> Sequence:
    """A sequence for the second model's table, of which the prompt is not reported. It has a number of
    its own, because several drafters may share the model."""
    request = seq.request
    if request.wants != Wants():
        request = replace(request, params=request.params.but(prompt_logprobs=None), wants=Wants())
    return Sequence(next(_numbers), request, seq.index, list(tokens), seq.prompt_len, seq.seed, sync_point=0)


@dataclass(frozen=True)
class SecondModel(TreeDrafter):
    """model: the draft model's folder or hub id; None: --draft-model, or the embedded one beside the embedded target."""

    model: str | None = field(default=None, kw_only=True)

    def open(self, runner: Any, sampler: Any) -> SecondModelDrafter:
        from redraft.models.draft_model import load_draft_model  # loads torch, which `redraft methods` does without

        return SecondModelDrafter(self, load_draft_model(runner, self.model), sampler)


class TreeGrower(Stateless):
    """Trees grown on a model, its own or the target's, in the tails of that model's table."""

    def __init__(self, method: TreeDrafter, runner: Runner, sampler: DraftSampler) -> None:
        self.method, self.runner, self.sampler = method, runner, sampler
        self.memory = runner.memory
        self.kinds = frozenset({Kind.FIXED, method.kind})
        self.kept: I64 | None = None  # the tokens of the head's rows where it was trimmed

    @property
    def bytes(self) -> int:
        """The rows of a trimmed head, unpacked; models are shared and not counted."""
        return 0 if self.kept is None else len(self.kept) * self.runner.spec.hidden * self.runner.backend.dtype.itemsize

    def trim(self, keep: I64) -> None:
        """Only the tokens `keep` (ascending) are drafted from now on: the head keeps their rows. Who shares the model sees
        nothing of it."""
        whole = self.runner.weights
        if whole.head.meta:  # a model that is only looked at
            return
        keep = keep[keep < whole.head.outs]  # checkpoints of one vocabulary are padded to different sizes
        self.runner = copy(self.runner)  # same memory and layers
        self.runner.weights = replace(whole, head=self.runner.backend.pack(whole.head.rows(keep)))
        self.kept = keep

    def _grow(self, growing: list[tuple[int, DraftState, Iterator[None]]]) -> None:
        """Level by level, all together, until no generator asks for more."""
        while growing:
            asking = []
            for one in growing:
                if next(one[2], one) is not one and len(one[1].sketch.tokens) > one[1].packed:  # type: ignore[union-attr]
                    asking.append(one)
            growing = asking
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
        """Runs rows into the tails. Behind each text's last token and each new node: the logits, f64[V], minus infinity where
        they are not looked at, and the log of the sum of all their exponentials where that is not the sum of these."""
        pages = self.memory.reserve(works, trees)
        out = self.runner.forward(self._pack(works, trees, pages), Taps(logits=True) if wanted else NOTHING)
        if not wanted:
            return None
        assert out.logits is not None
        vocab = self.sampler.vocabulary.size  # checkpoints of one vocabulary are padded to different sizes
        logits, most = out.logits[:, :vocab], self.method.candidates
        totals: list[float | None] = [None] * len(logits)
        places: I64 = np.arange(logits.shape[1])[None]
        if greedy := not most and all(work.seq.params.greedy for work in works):
            most = LIKELIEST
        if 0 < most < logits.shape[1]:
            if greedy:  # nothing is drawn, and a probability is how sure the model is
                totals = logits.double().logsumexp(-1).tolist()
            logits, likeliest = logits.topk(most, sorted=False)
            places = likeliest.cpu().numpy()
        rows = np.full((len(logits), vocab), -np.inf)
        np.put_along_axis(rows, places if self.kept is None else self.kept[places], logits.double().cpu().numpy(), 1)
        return list(zip(rows, totals, strict=True))

    def _pack(self, works: list[Work], trees: list[TokenTree], pages: PageView) -> Batch:
        return Batch.pack(works, trees, pages)


class SecondModelDrafter(TreeGrower):
    """The opened form of every drafter with a second model: state of a request is its DraftState."""

    # ---- one text

    def begin(self, seq: Sequence) -> DraftState:
        mirrored = mirror(seq, seq.tokens if self._knows(seq.tokens) else [])
        self.memory.open(mirrored)
        try:
            if mirrored.tokens:
                self.memory.attach(mirrored, self.memory.match(mirrored.tokens, seq.request.salt))
        except BaseException:
            self.memory.free(mirrored)
            raise
        return DraftState(mirrored)

    def fork(self, state: DraftState, seq: Sequence) -> DraftState:
        self._forget(state)
        mirrored = mirror(seq, state.seq.tokens)
        if self.memory.available() < 1:  # the partial page is copied; without one the text is read again
            return self.begin(seq)
        self.memory.fork(state.seq, mirrored)
        return DraftState(mirrored)

    def end(self, state: DraftState) -> None:
        state.sketch = state.work = None
        self.memory.free(state.seq)

    # ---- one step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence whose text the second model has read; the rest it reads on."""
        trees = [EMPTY] * len(seqs)
        growing: list[tuple[int, DraftState, Iterator[None]]] = []
        works: list[Work] = []
        drafting: list[tuple[int, DraftState] | None] = []  # beside works
        left, free = CHUNK, self.memory.available()
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            state: DraftState = seq.state[self]
            self._forget(state)
            mirrored = state.seq
            if not self._knows(new := seq.tokens[len(mirrored.tokens) :]):
                continue
            mirrored.tokens += new
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
                state.sketch = Sketch(seq, Budget(room, depth), self.method.kind, self.sampler)
                state.work, state.packed = works[-1], 0
            drafting.append((i, state) if whole else None)
        if not works:
            return trees
        drawing = [work.done for work in works]  # as long as nothing is committed
        logits = self._forward(works, [EMPTY] * len(works), wanted=any(drafting))
        read = [work for work, one in zip(works, drafting, strict=True) if one is None]
        self._commit(read, [Accepted()] * len(read))
        at = 0
        for done, one in zip(drawing, drafting, strict=True):
            if one is not None:
                i, state = one
                assert state.sketch is not None and logits is not None
                state.sketch.learn(-1, *logits[at])
                growing.append((i, state, self.method.grow(state.sketch)))
            at += done
        self._grow(growing)
        for i, state, _ in growing:
            assert state.sketch is not None
            trees[i] = state.sketch.tree()
        return trees

    def observe(self, result: StepResult) -> None:
        """Commits what the target accepted of each tree, as far as its nodes were run."""
        works, kept = [], []
        for work, accepted in zip(result.work, result.accepted, strict=True):
            state: DraftState | None = work.seq.state.get(self)
            if state is None or state.work is None or state.sketch is None:
                continue
            tree, node, path = state.sketch.tree(), -1, []
            for token in accepted.tokens[:-1]:
                node = tree.child(node, token)
                if not 0 <= node < state.packed:
                    break
                path.append(node)
            works.append(state.work)
            kept.append(Accepted(tuple(path), tuple(accepted.tokens[: len(path)])))
            state.sketch = state.work = None
        self._commit(works, kept)

    # ---- the second model

    def _knows(self, tokens: Seq[int]) -> bool:
        """Whether it has embeddings for them: checkpoints of one vocabulary are padded to different sizes."""
        return max(tokens, default=0) < self.runner.spec.vocab

    def _commit(self, works: list[Work], accepted: list[Accepted]) -> None:
        if works:
            self.memory.move(self.memory.commit(works, accepted))
            for work in works:
                self.memory.publish(work.seq)

    def _forget(self, state: DraftState) -> None:
        """Drops the tail of a step that raised before its end."""
        self.memory.discard(state.seq)
        state.sketch = state.work = None
