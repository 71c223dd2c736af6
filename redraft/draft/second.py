"""What drafters that draw from a model share: trees grown level by level, and a second model's cache kept level with the text.

A method is a generator, `grow(sketch)`: it adds nodes drawn from laws that the sketch knows, and each `yield` asks for the
laws behind all nodes added since. The trees of all sequences grow in lockstep, one forward of the drafting model a level.

The second model keeps its own table. Its text follows the target's: what is pending there runs first, a chunk at a time,
while the target reads the prompt; behind it the tree is the tail, and what the target accepted of it is committed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from redraft import registry
from redraft.core.batch import Batch, PageView
from redraft.core.noise import Stream, gumbel, key, mix, uniform
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.ranking import top
from redraft.core.sequence import Sequence
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import EMPTY, F64, I64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler, Stateless
from redraft.errors import InvalidInput

if TYPE_CHECKING:
    from redraft.models.runner import Runner

CHUNK = 512  # rows of text that a step reads at most
UNDERFLOW = 600.0  # nats below the likeliest token at which a token cannot be drawn where coins weigh it: q must be a number
LIKELIEST = 128  # tokens that are looked at behind a node at temperature 0, and the most children that it can get there


Noise = Callable[[int, I64], F64]


class NextLaw:
    """The draft's law of the token behind one node. ids: i64[M], ascending, the tokens that have mass; logq: f64[M], log of
    the law that children are drawn from; noise: the key of the node's own noise, None at temperature 0; total: log of the
    sum of exp(values) over all tokens where these are some of them."""

    def __init__(
        self, ids: I64, values: F64, noise: int | None, *, target: bool, total: float | None = None, noise_of: Noise = gumbel
    ) -> None:
        least = -np.inf if noise is None or target else values.max(initial=-np.inf) - UNDERFLOW
        if len(alive := np.flatnonzero(values > least)) < len(ids):
            ids, values = ids[alive], values[alive]
        self.ids, self._noise, self._target, self._gumbel = ids, noise, target, noise_of
        self._order: list[int] = []
        if total is None and len(ids):
            best = values.max()
            total = best + np.log(np.exp(values - best).sum())
        self.logq: F64 = values if total is None else values - total

    @cached_property
    def keys(self) -> F64:
        """f64[M]: log q plus Gumbel noise, by which children are drawn; log q itself at temperature 0."""
        return self.logq if self._noise is None else self.logq + self._gumbel(self._noise, self.ids)

    def best(self, k: int) -> list[int]:
        """The places in ids of the k largest keys, best first: k samples without replacement, in draw order. Fewer where
        fewer tokens have mass."""
        return [int(place) for place in top(self.keys, min(k, len(self.ids)))]

    def likeliest(self, k: int) -> list[int]:
        """The places in ids of the k largest probabilities, best first."""
        return [int(place) for place in top(self.logq, min(k, len(self.ids)))]

    def nth(self, i: int) -> int | None:
        """The place of the i-th sample without replacement, from 0; None where no token with mass is left."""
        while i >= len(self._order) < len(self.ids):
            if len(found := self.best(2 * (i + 1))) <= len(self._order):
                raise ValueError("the draft's law holds NaN")
            self._order = found
        return self._order[i] if i < len(self._order) else None

    def samples(self, numbers: Seq[int]) -> list[int]:
        """The places of independent samples, one for each draw number. Where the target's own noise is asked for, number
        0 draws with it. All the likeliest token at temperature 0."""
        if self._noise is None or not len(self.ids):
            return self.best(1) * len(numbers)
        sums = np.cumsum(np.exp(self.logq))
        coins = uniform(mix(self._noise, 1), np.asarray(numbers)) * sums[-1]
        places = np.searchsorted(sums, coins, side="right").tolist()
        return [self.best(1)[0] if self._target and number == 0 else place for number, place in zip(numbers, places, strict=True)]


class Sketch:
    """A tree in the making: what `grow` sees. Node -1 is the text's last token."""

    def __init__(self, seq: Sequence, budget: Budget, kind: Kind, sampler: DraftSampler) -> None:
        self.seq, self.budget, self.sampler = seq, budget, sampler
        self.kind = Kind.FIXED if seq.params.greedy else kind
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.draws: list[int] = []
        self.scores: list[float] = []
        self.laws: list[NextLaw] = []  # of node i at place i + 1
        self._children: dict[tuple[int, int], int] = {}
        self._noise: dict[int, F64] = {}
        self._ends = frozenset() if seq.params.ignore_eos else sampler.vocabulary.eos

    # ---- for methods

    @property
    def room(self) -> int:
        """Nodes that may still be added."""
        return self.budget.rows - len(self.tokens)

    @property
    def greedy(self) -> bool:
        return self.seq.params.greedy

    def law(self, node: int) -> NextLaw:
        return self.laws[node + 1]

    def open(self, node: int) -> bool:
        """Whether `node` may have children: it is not as deep as allowed, and its token does not end the text."""
        return node < 0 or (self.depths[node] < self.budget.depth and self.tokens[node] not in self._ends)

    def add(self, parent: int, place: int) -> int:
        """A child of `parent` that carries the token at `place` of its law: the node, an old one where it has that token
        already (one more draw of it)."""
        law = self.law(parent)
        token = int(law.ids[place])
        if (node := self._children.setdefault((parent, token), len(self.tokens))) < len(self.tokens):
            self.draws.append(node)
            return node
        above, depth = (1.0, 0) if parent < 0 else (self.scores[parent], self.depths[parent])
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth + 1)
        self.scores.append(above * float(np.exp(law.logq[place])))
        self.draws.append(node)
        return node

    # ---- for the grower

    def _gumbel(self, noise: int, ids: I64) -> F64:
        """Nodes of one depth share the target's noise: over the whole vocabulary it is made once for all of them."""
        if len(ids) < self.sampler.vocabulary.size:
            return gumbel(noise, ids)
        if noise not in self._noise:
            self._noise[noise] = gumbel(noise, ids)
        return self._noise[noise]

    def learn(self, node: int, values: F64, total: float | None = None) -> None:
        """The drafting model's logits behind `node`; total: see NextLaw."""
        path: list[int] = []
        at = node
        while at >= 0:
            path.append(self.tokens[at])
            at = self.parents[at]
        path.reverse()
        row = self.sampler.row(values, self.seq, path)
        target = self.sampler.drafts is Stream.TARGET
        noise = None
        if not self.seq.params.greedy:
            noise = key(self.seq.seed, self.sampler.drafts, len(self.seq.tokens) + len(path))
            if not target:
                # Nodes of one depth must not share noise where coins are tossed: how many children one gets may depend on
                # what another drew, which would tell of its own next draw.
                noise = mix(noise, *path)
        self.laws.append(NextLaw(row.ids, row.values, noise, target=target, total=total, noise_of=self._gumbel))

    def tree(self) -> TokenTree:
        n = len(self.tokens)
        if not n:
            return EMPTY
        kinds = np.zeros(n + 1, np.uint8)
        kinds[[parent + 1 for parent in self.parents]] = self.kind
        return TokenTree(
            np.array(self.tokens, np.int32),
            np.array(self.parents, np.int32),
            kinds,
            laws=None if self.kind is Kind.FIXED else Laws(self.laws, self.sampler.vocabulary.size),
            draws=np.array(self.draws, np.int32) if self.kind is Kind.IID else None,
            scores=np.array(self.scores, np.float32),
        )


@dataclass(frozen=True, eq=False, slots=True)
class Laws:
    """Probs of a sketch's nodes; dense rows are made when a verifier asks."""

    laws: list[NextLaw]
    vocab: int

    def probs(self, rows: Seq[int]) -> F64:
        out = np.zeros((len(rows), self.vocab))
        for i, row in enumerate(rows):
            law = self.laws[row]
            q = np.exp(law.logq)
            out[i, law.ids] = q / q.sum()
        return out


@dataclass(eq=False, slots=True)
class Twin:
    """One text as the drafting model's table holds it. sketch, packed: the tree whose first nodes are its tail; work: how
    its tail began."""

    seq: Sequence
    sketch: Sketch | None = None
    work: Work | None = None
    packed: int = 0


_numbers = itertools.count()


def shadow(seq: Sequence, tokens: Seq[int]) -> Sequence:
    """A sequence for the second model's table, which nobody asks for log-probabilities of its prompt. It has a number of
    its own, because several drafters may share the model."""
    request, params = seq.request, seq.params
    if params.prompt_logprobs is not None:
        request = replace(request, params=params.but(prompt_logprobs=None))
    return Sequence(next(_numbers), request, seq.index, list(tokens), seq.prompt_len, seq.seed, border=0)


@dataclass(frozen=True)
class Drawing:
    """candidates: children are drawn from the likeliest so many tokens of the draft's law, renormalised; 0: from all."""

    candidates: int = field(default=0, kw_only=True)

    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        self.at_least("candidates", 0)

    def at_least(self, name: str, least: float) -> None:
        """InvalidInput where an option is smaller."""
        if getattr(self, name) < least:
            raise InvalidInput(f"{registry.name_of(type(self))}:{name}={getattr(self, name)}: must be {least} or more")

    def grow(self, tree: Sketch) -> Iterator[None]:
        """Adds nodes; every yield asks for the laws behind all nodes added since."""
        raise NotImplementedError


@dataclass(frozen=True)
class SecondModel(Drawing):
    """model: the draft model's folder or hub id; None: --draft-model, or the embedded one beside the embedded target."""

    model: str | None = field(default=None, kw_only=True)

    def open(self, runner: Any, sampler: Any) -> Grower:
        from redraft.models.companion import companion  # loads torch, which `redraft methods` does without

        return Grower(self, companion(runner, self.model), sampler)


class Leveller(Stateless):
    """Trees grown on a model, its own or the target's, in the tails of that model's table."""

    def __init__(self, method: Drawing, runner: Runner, sampler: DraftSampler) -> None:
        self.method, self.runner, self.sampler = method, runner, sampler
        self.memory = runner.memory
        self.kinds = frozenset({Kind.FIXED, method.kind})
        self.kept: I64 | None = None  # the tokens of the head's rows where it was trimmed

    def trim(self, keep: I64) -> None:
        """Only the tokens `keep` (ascending) are drafted from now on: the head keeps their rows. Who shares the model sees
        nothing of it."""
        whole = self.runner.weights
        if whole.head.hollow:  # a model that is only looked at
            return
        keep = keep[keep < whole.head.outs]  # checkpoints of one vocabulary are padded to different sizes
        self.runner = copy(self.runner)  # same memory and layers
        self.runner.weights = replace(whole, head=self.runner.backend.pack(whole.head.rows(keep)))
        self.kept = keep

    def _grow(self, growing: list[tuple[int, Twin, Iterator[None]]]) -> None:
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


class Grower(Leveller):
    """The opened form of every drafter with a second model: state of a request is its Twin."""

    # ---- one text

    def begin(self, seq: Sequence) -> Twin:
        twin = shadow(seq, seq.tokens if self._knows(seq.tokens) else [])
        self.memory.open(twin)
        try:
            if twin.tokens:
                self.memory.attach(twin, self.memory.match(twin.tokens, seq.request.salt))
        except BaseException:
            self.memory.free(twin)
            raise
        return Twin(twin)

    def fork(self, state: Twin, seq: Sequence) -> Twin:
        self._forget(state)
        twin = shadow(seq, state.seq.tokens)
        if self.memory.available() < 1:  # the partial page is copied; without one the text is read again
            return self.begin(seq)
        self.memory.fork(state.seq, twin)
        return Twin(twin)

    def end(self, state: Twin) -> None:
        state.sketch = state.work = None
        self.memory.free(state.seq)

    # ---- one step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """A tree for each sequence whose text the second model has read; the rest it reads on."""
        trees = [EMPTY] * len(seqs)
        growing: list[tuple[int, Twin, Iterator[None]]] = []
        works: list[Work] = []
        drafting: list[tuple[int, Twin] | None] = []  # beside works
        left, free = CHUNK, self.memory.available()
        for i, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            state: Twin = seq.state[self]
            self._forget(state)
            twin = state.seq
            if not self._knows(new := seq.tokens[len(twin.tokens) :]):
                continue
            twin.tokens += new
            depth = min(budget.depth, self.runner.spec.context - len(twin.tokens))
            rows = min(twin.pending, left)
            whole = rows == twin.pending and min(budget.rows, depth) > 0
            room = budget.rows if whole else 0
            while room and self.memory.need(twin, rows + room) > free:
                room //= 2
            need = self.memory.need(twin, rows + room)
            if not rows or depth < 0 or need > free or (whole and not room):
                continue
            left, free = left - rows, free - need
            works.append(Work(twin, rows))
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
            state: Twin | None = work.seq.state.get(self)
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

    def _forget(self, state: Twin) -> None:
        """Drops the tail of a step that raised before its end."""
        self.memory.discard(state.seq)
        state.sketch = state.work = None
