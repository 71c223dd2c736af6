"""Drafters that read the target's hidden states: a small model of their own follows the text, and trees grow level by level.

A row of the small model is made of a token and of a state that the target computed. Rows are read with the next draft, so reading the
text and the first level of the tree are one pass. Texts whose states are partly unknown, because their keys came from the prefix cache or
because the drafter was not asked, are read without those rows: the other rows keep their positions, and drafts may be worse.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from redraft.core.batch import Batch
from redraft.core.noise import Stream, gumbel, key
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F64, I32, I64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler, Stateless
from redraft.draft.second import CHUNK, mirror
from redraft.draft.trained_layers import TrainedLayers
from redraft.models.runner import Runner
from redraft.ops.arrays import Tensor, array, namespace, widened
from redraft.ops.format import PAGE

MOST_WAITING = 4 * CHUNK  # rows whose states are kept until they are read; the others count as unknown
CHILDREN = 8  # the most children of a node
CANDIDATES = 64  # tokens from which they are drawn where the text is sampled


class Rows(NamedTuple):
    """States of consecutive tokens of a text, which wait to be read. first: the index of the first token; states: [n, hidden]."""

    first: int
    states: Tensor


@dataclass(eq=False, slots=True)
class Followed:
    """The state of one request. text: its own sequence; seq: the tokens that were read, in the small model's memory; waiting: what was not
    read yet; read: the index of the token after the last one that was read; whole: whether none was left out, so that pages can be
    shared."""

    text: Sequence
    seq: Sequence
    read: int
    whole: bool = True
    waiting: list[Rows] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(len(rows.states) for rows in self.waiting)

    @property
    def end(self) -> int:
        """The index of the token after the last one that is known."""
        return self.waiting[-1].first + len(self.waiting[-1].states) if self.waiting else self.read


class Limits(NamedTuple):
    """How trees grow. levels: the deepest node; width: the most nodes of a level that get children; children: the most children of a
    node; least: the smallest probability of a path that is drafted; sure: the probability below which a token gets no children; worth: the
    sum of the probabilities of the paths that a level continues, below which it does not run."""

    levels: int
    width: int
    children: int = CHILDREN
    least: float = 0.0
    sure: float = 0.0
    worth: float = 0.0


class Draft:
    """The tree of one text while it grows. Its nodes are candidates, of which `ran` have run, in this order. states: of the text's last
    token and of each node that ran."""

    def __init__(self, seq: Sequence, budget: Budget, sampler: DraftSampler, limits: Limits) -> None:
        self.seq, self.budget, self.sampler, self.limits = seq, budget, sampler, limits
        self.depth = min(budget.depth, limits.levels)
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.scores: list[float] = []
        self.ran: list[int] = []
        self.places = {-1: -1}  # node -> its place in `ran`
        self.states: list[Tensor] = []
        self._fresh: list[int] = []  # nodes of the newest level
        self._ends = frozenset() if seq.params.ignore_eos else sampler.vocabulary.eos

    @property
    def candidates(self) -> int:
        """How many of the largest logits learn() needs."""
        return CHILDREN if self.seq.params.greedy else CANDIDATES

    def learn(self, node: int, state: Tensor, ids: I64, values: F64, total: float) -> None:
        """What the small model says after `node`. state: [1, hidden], what stands for its state; ids: ascending; values: f64, their logits;
        total: the log-sum-exp of all logits."""
        self.states.append(state)
        path, at = list[int](), node
        while at >= 0:
            path.append(self.tokens[at])
            at = self.parents[at]
        path.reverse()
        row = self.sampler.few(ids, values, self.seq, path)
        ids, values = row.ids, row.values
        if not len(ids):
            return
        if self.seq.params.greedy:
            keys = values
            chances = np.exp(values - max(total, values.max()))
        else:
            keys = values
            if self.sampler.drafts is Stream.TARGET:  # the noise that the target will draw with
                keys = values + gumbel(key(self.seq.seed, Stream.TARGET, len(self.seq.tokens) + len(path)), ids)
            chances = np.exp(keys - keys.max())
            chances /= chances.sum()
        above, depth = (1.0, 1) if node < 0 else (self.scores[node], self.depths[node] + 1)
        for place in np.argsort(-keys, kind="stable")[: self.limits.children].tolist():
            score = above * float(chances[place])
            if score < self.limits.least and self.tokens:
                break
            self._fresh.append(len(self.tokens))
            self.tokens.append(int(ids[place]))
            self.parents.append(node)
            self.depths.append(depth)
            self.scores.append(score)

    def choose(self) -> list[int]:
        """The nodes of the newest level that run next. They enter `ran`."""
        fresh, self._fresh = self._fresh, []
        wanted = [node for node in fresh if self._grows(node)]
        most = min(self.limits.width, self.budget.rows - len(self.ran))
        chosen = sorted(sorted(wanted, key=lambda node: -self.scores[node])[:most])
        if sum(self.scores[node] for node in chosen) < self.limits.worth:
            return []
        for node in chosen:
            self.places[node] = len(self.ran)
            self.ran.append(node)
        return chosen

    def _grows(self, node: int) -> bool:
        parent = self.parents[node]
        above = self.scores[parent] if parent >= 0 else 1.0
        sure = self.scores[node] >= max(self.limits.least, self.limits.sure * above)
        return sure and self.depths[node] < self.depth and self.tokens[node] not in self._ends

    def above(self, nodes: Seq[int]) -> list[Tensor]:
        """The states [1, hidden] of their parents."""
        return [self.states[1 + self.places[self.parents[node]]] for node in nodes]

    def running(self) -> TokenTree:
        """The nodes that ran or run next, the tail of the small model's memory."""
        return _tree([self.tokens[n] for n in self.ran], [self.places[self.parents[n]] for n in self.ran])

    def tree(self) -> TokenTree:
        """The best nodes within the budget. None scores above its parent, so they form a tree."""
        best = sorted(range(len(self.tokens)), key=lambda node: (-self.scores[node], node))[: self.budget.rows]
        kept = sorted(node for node in best if self.depths[node] <= self.budget.depth)
        place = {-1: -1, **{node: i for i, node in enumerate(kept)}}
        found = _tree([self.tokens[n] for n in kept], [place[self.parents[n]] for n in kept])
        return replace(found, scores=np.array([self.scores[n] for n in kept], np.float32))


def _tree(tokens: list[int], parents: list[int]) -> TokenTree:
    return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.zeros(len(tokens) + 1, np.uint8))


def joined(parts: Seq[Tensor]) -> Tensor:
    """Rows one after the other."""
    return parts[0] if len(parts) == 1 else namespace(parts[0]).concat(list(parts), axis=0)


def normed(runner: Runner, hidden: Tensor) -> Tensor:
    """States after the last layer, normed as the head reads them."""
    with runner.backend.mode():
        return runner.backend.norm(hidden, runner.weights.final_norm, runner.spec.final_norm)


class Follower(Stateless):
    """The opened form. target: the Runner whose states are read, behind `layer`; runner: the small model, whose rows start from `inputs`;
    lag: a row has the state of the token so many places before its own; kept: the tokens of the small model's head, ascending.

    The children of all nodes are FIXED: with the target's own noise where the verifier allows it, else the likeliest tokens."""

    lag = 1

    def __init__(self, target: Runner, trained: TrainedLayers, sampler: DraftSampler, limits: Limits, layer: int) -> None:
        self.target, self.runner, self.sampler, self.limits = target, trained.runner, sampler, limits
        self.memory, self.layer, self.kept = trained.runner.memory, layer, trained.kept
        self.taps = Taps(hidden=frozenset({layer}))
        self.kinds = frozenset({Kind.FIXED})
        self._bytes = trained.bytes

    @property
    def bytes(self) -> int:
        return self._bytes

    # ---- what a subclass says

    def seen(self, hidden: Tensor) -> Tensor:
        """The states [n, hidden] of rows from the target's hidden states."""
        raise NotImplementedError

    def inputs(self, tokens: I32, states: Tensor) -> Tensor:
        """The vectors [n, hidden] with which rows of these tokens and states start."""
        raise NotImplementedError

    def prepare(self, seqs: Seq[Sequence]) -> None:
        """Before a draft of these texts: may note further states."""

    def states(self, levels: Seq[tuple[Draft, Seq[int]]]) -> Tensor:
        """[n, hidden]: the states with which the rows of these nodes start, which are the newest that run."""
        return joined([state for draft, nodes in levels for state in draft.above(nodes)])

    # ---- one request

    def begin(self, seq: Sequence) -> Followed:
        """Attaches what the small model still has of the tokens that the target found in its own prefix cache."""
        first = self.lag
        known = seq.tokens[first : seq.stored + first]
        read = mirror(seq, [*known, 0] if known else [])  # a match leaves out the last token
        self.memory.open(read)
        try:
            if known:
                self.memory.attach(read, self.memory.match(read.tokens, seq.request.salt))
        except BaseException:
            self.memory.free(read)
            raise
        del read.tokens[read.stored :]
        return Followed(seq, read, first + read.stored)

    def fork(self, state: Followed, seq: Sequence) -> Followed:
        self._forget(state)
        read = mirror(seq, state.seq.tokens)
        if self.memory.available() < 1:  # a fork copies the partial page
            return self.begin(seq)
        self.memory.fork(state.seq, read)
        return Followed(seq, read, state.read, state.whole, list(state.waiting))

    def end(self, state: Followed) -> None:
        """What waits is read first where it fills a page that later texts can attach."""
        try:
            self._forget(state)
            pages = (state.seq.stored + state.rows) // PAGE - state.seq.stored // PAGE
            if state.whole and pages and state.rows <= CHUNK and self.memory.need(state.seq, state.rows) <= self.memory.available():
                self._read([(state, state.rows)], [None])
        finally:
            state.waiting.clear()
            self.memory.free(state.seq)

    # ---- one step

    def observe(self, result: StepResult) -> None:
        """Keeps the states of the accepted rows until they are read."""
        batch, hidden = result.batch, result.out.hidden.get(self.layer)
        if hidden is None:
            return
        starts, ends = batch.starts.tolist(), batch.tree_starts.tolist()
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            state: Followed | None = work.seq.state.get(self)
            if state is None:
                continue
            first, end = starts[s], ends[s]
            rows = [*range(first, end), *(end + node for node in accepted.path)]
            if rows:
                self.note(state, int(batch.positions[first]) + self.lag, self.seen(hidden[rows]))

    def note(self, state: Followed, first: int, states: Tensor) -> None:
        """Keeps the states of rows that follow each other until they are read. first: the index of the first one."""
        while state.waiting and state.end > first:  # those are known again
            start, known = state.waiting.pop()
            if start < first:
                state.waiting.append(Rows(start, known[: first - start]))
        if state.rows + len(states) > MOST_WAITING:
            state.waiting.clear()
        skipped = max(0, state.read - first)  # rows that the small model has already
        if skipped < len(states):
            state.waiting.append(Rows(first + skipped, states[skipped:]))

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence that the small model has read completely. For the others it reads the next chunk."""
        trees = [EMPTY] * len(seqs)
        drafts: list[Draft | None] = []
        reading: list[tuple[Followed, int]] = []
        places: list[int] = []
        left, free = CHUNK, self.memory.available()
        for seq in seqs:
            self._forget(seq.state[self])
        self.prepare([seq for seq, budget in zip(seqs, budgets, strict=True) if min(budget) > 0])
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            state: Followed = seq.state[self]
            rows = min(state.rows, left)
            drafting = rows == state.rows > 0 and state.end == len(seq.tokens) and min(budget) > 0
            if not rows or (not drafting and state.rows < CHUNK // 2 and min(budget) == 0):
                continue  # few rows wait until they are needed
            room = self.limits.width * self.limits.levels if drafting else 0
            need = self.memory.need(state.seq, rows + room)
            if need > free:
                continue
            left, free = left - rows, free - need
            drafts.append(Draft(seq, budget, self.sampler, self.limits) if drafting else None)
            reading.append((state, rows))
            places.append(i)
        if not reading:
            return trees
        self._read(reading, drafts)
        growing = [(state, draft) for (state, _), draft in zip(reading, drafts, strict=True) if draft is not None]
        try:
            self._grow(growing)
        finally:
            for state, _ in growing:
                self.memory.discard(state.seq)
        for i, draft in zip(places, drafts, strict=True):
            if draft is not None:
                trees[i] = draft.tree()
        return trees

    # ---- the small model

    def _read(self, reading: Seq[tuple[Followed, int]], drafts: Seq[Draft | None]) -> None:
        """Reads rows of text and commits them. Each draft learns what follows its text."""
        works, positions, states = list[Work](), list[int](), list[Tensor]()
        for state, rows in reading:
            own = list[int]()
            for first, known in state.waiting:
                taken = min(rows - len(own), len(known))
                own += range(first, first + taken)
                states.append(known[:taken])
            state.whole = state.whole and own == list(range(state.read, state.read + rows))
            state.seq.tokens += [state.text.tokens[index] for index in own]
            positions += own
            works.append(Work(state.seq, rows))
        empty = [EMPTY] * len(works)
        batch = Batch.pack(works, empty, self.memory.reserve(works, empty))
        chosen = [s for s, draft in enumerate(drafts) if draft is not None]
        batch = replace(batch, logit_rows=batch.logit_rows[chosen], positions=np.array(positions, np.int32))
        found = self._forward(batch, joined(states), [draft for draft in drafts if draft is not None])
        self.memory.move(self.memory.commit(works, [Accepted()] * len(works)))
        at = 0
        for state, rows in reading:
            state.read = positions[at + rows - 1] + 1
            at += rows
            left = rows
            while left:
                first, known = state.waiting.pop(0)
                if left < len(known):
                    state.waiting.insert(0, Rows(first + left, known[left:]))
                left -= min(left, len(known))
            if state.whole:
                self.memory.publish(state.seq)
        for draft, learned in zip([draft for draft in drafts if draft is not None], found, strict=True):
            draft.learn(-1, *learned)

    def _grow(self, growing: list[tuple[Followed, Draft]]) -> None:
        """Grows the trees level by level, until none has a node that pays to follow."""
        while growing:
            levels = [(state, draft, chosen) for state, draft in growing if (chosen := draft.choose())]
            if not levels:
                return
            works = [Work(state.seq, 0, len(draft.ran) - len(chosen)) for state, draft, chosen in levels]
            trees = [draft.running() for _, draft, _ in levels]
            batch = Batch.pack(works, trees, self.memory.reserve(works, trees))
            shift = [state.read - state.seq.stored for state, _, _ in levels]  # of positions, by what was left out
            positions = batch.positions + np.repeat(np.array(shift, np.int32), np.diff(batch.starts)) if any(shift) else batch.positions
            states = self.states([(draft, chosen) for _, draft, chosen in levels])
            found = self._forward(replace(batch, positions=positions), states, [draft for _, draft, _ in levels])
            at = 0
            for _, draft, chosen in levels:
                for node in chosen:
                    draft.learn(node, *found[at])
                    at += 1
            growing = [(state, draft) for state, draft, _ in levels]

    def _forward(self, batch: Batch, states: Tensor, drafts: Seq[Draft]) -> list[tuple[Tensor, I64, F64, float]]:
        """For each logit row what stands for its state [1, hidden], the ids of the largest logits, ascending, these logits, and the
        log-sum-exp of all. states: [T, hidden], with which the rows start."""
        every = np.arange(len(batch.tokens))
        batch = replace(batch, vectors=(every, self.inputs(batch.tokens, states)))
        if not len(batch.logit_rows):
            self.runner.forward(batch)
            return []
        last = len(self.runner.spec.layers) - 1
        k = min(max(draft.candidates for draft in drafts), self.runner.weights.head.outs)
        out = self.runner.forward(batch, Taps(frozenset({last}), k, logits=True))
        assert out.logits is not None and out.top_k is not None
        own = normed(self.runner, out.hidden[last][batch.logit_rows.astype(np.int64)])
        places = np.sort(out.top_k.astype(np.int64), axis=1)
        logits = widened(array(out.logits))
        most = logits.max(1, keepdims=True)
        totals = np.log(np.exp(logits - most).sum(1, dtype=np.float64)) + most[:, 0]
        values = logits[np.arange(len(places))[:, None], places].astype(np.float64)
        return [(own[r : r + 1], self.kept[places[r]], values[r], total) for r, total in enumerate(totals.tolist())]

    def _forget(self, state: Followed) -> None:
        """Drops the tentative rows of a step that raised."""
        self.memory.discard(state.seq)
        del state.seq.tokens[state.seq.stored :]
