"""The target drafts with some of its attention and MLP halves skipped. Which ones is searched for while it generates.

Heming Xia, Yongqi Li, Jun Zhang, Cunxiao Du, Wenjie Li: SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration,
2024, arXiv 2410.06916.

1. A set has floor(ratio * 2 (L - 2)) of the halves of all layers but the first and the last.
2. While the search is active, each step tries one set: the model without these halves runs over the last `window` tokens of one text, in
   one forward pass over keys of the whole model before them. The score is the share of these tokens that it gives the largest logit. The
   rows are discarded.
3. The best set so far drafts. A set that scores higher is tried twice more, on later tokens, and takes its place if the mean is higher too.
   The search ends at a score of `enough`, after `patience` sets without a better one, or after `trials` trials.
4. Which sets are tried: each half alone; the halves that did least harm alone; then exchanges of a few halves of the best set, and every
   25th time the set with the largest upper confidence bound of a Gaussian process over all scores.
5. Draft a chain until the probability of a token is below `stop`. Beside each token of the chain stand its likeliest rivals as leaves:
   2, 4, 7 or 9 of them where its own probability is above 0.95, 0.8, 0.5, or less. The chain comes first if the budget is short.

Differs: the paper starts from even spacing and draws random sets, which almost never draft well in small models; here single halves
are scored first, sets near the best one are drawn, and one lucky window does not decide. The window is the end of the text instead of its
start; up to a page of tokens before it also runs without the halves. Nothing is drafted before a whole set was tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Budget, Work
from redraft.core.sequence import PLAIN, Sequence, Wants
from redraft.core.tree import EMPTY, F64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler
from redraft.draft.self_skip import LayerDrafter, Skipping
from redraft.draft.sketch import Sketch
from redraft.errors import InvalidInput
from redraft.options import number

SCRATCH = -(1 << 40)  # the id of the text of a trial; one at a time
RIVALS = ((0.95, 2), (0.8, 4), (0.5, 7), (0.0, 9))  # above this probability, so many siblings
TRIED, APART = 3, 16  # windows on which a set must be better than the best one on average, so many trials apart: one is often lucky
BAYES_EVERY, CANDIDATES, KAPPA, NOISE, POINTS = 25, 512, 2.5, 1e-2, 256  # of the Gaussian process; it uses the newest POINTS scores

Set = tuple[int, ...]  # of skipped halves, ascending: 2 (l - 1) is the attention of layer l, 2 (l - 1) + 1 its MLP


@dataclass(frozen=True)
class SWIFT(LayerDrafter):
    """ratio: the share of halves that a set skips; window: tokens of a trial; enough: the score that ends the search; patience, trials: the
    sets without a better one and all trials after which it ends; length: the most tokens of a chain; stop: the probability below which
    it ends; seed: of the search."""

    ratio: float = number(0.45, ge=0, lt=1)
    window: int = number(32, ge=1)
    enough: float = number(0.93, ge=0, le=1)
    patience: int = number(300, ge=1)
    trials: int = number(1000, ge=0)
    length: int = number(25, ge=1)
    stop: float = number(0.8, ge=0, le=1)
    seed: int = 0

    card: ClassVar[Card] = Card(
        "SWIFT",
        "Xia, Li, Zhang, Du, Li, SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration, 2024, arXiv 2410.06916",
        Guarantee.SAME_TEXT,
        needs="a target of 3 layers or more, and prefix sharing for its search",
        deviates="sets near the best one are tried instead of random ones, after each half alone; the newest tokens are the test",
        summary="Learns which halves of layers to skip; deep models",
    )
    kind: ClassVar[Kind] = Kind.WITHOUT_REPLACEMENT

    def layers(self, count: int) -> frozenset[int]:
        """All, before a set was tried. Raises InvalidInput if no layer lies between the first and the last."""
        if count < 3:
            raise InvalidInput(f"swift: the target has {count} layers, and the first and the last always run; 3 layers or more are needed")
        return frozenset(range(count))

    def grow(self, tree: Sketch) -> Iterator[None]:
        chain: list[tuple[int, list[int]]] = []  # a node and the places of its children that stay leaves
        node = -1
        for more in reversed(range(min(self.length, tree.room))):
            distribution = tree.distribution(node)
            places = distribution.best(1 + RIVALS[-1][1])
            if not places:
                break
            sure = float(np.exp(distribution.logq[places[0]]))
            rivals = next(count for above, count in RIVALS if sure > above or not above)
            chain.append((node, places[1 : 1 + rivals]))
            node = tree.add(node, places[0])
            if not more or sure < self.stop or not tree.open(node):
                break
            yield
        for parent, leaves in chain:
            for place in leaves[: tree.room]:
                tree.add(parent, place)

    def open(self, runner: Any, sampler: Any) -> Searching:
        return Searching(self, runner, sampler)


class Search:
    """Which sets are tried, and the best one so far. It is a function of the options and of the scores."""

    def __init__(self, method: SWIFT, halves: int) -> None:
        self.method, self.halves, self.size = method, halves, int(method.ratio * halves)
        self.tried: list[tuple[Set, float]] = []
        self.best: tuple[Set, float] | None = None if self.size else ((), 1.0)
        self.misses = 0
        self._again: Set | None = None  # a set that is not decided yet
        self._scores: list[float] = []  # its scores
        self._due = 0  # the trial in which it is tried again

    @property
    def active(self) -> bool:
        method, score = self.method, 0.0 if self.best is None else self.best[1]
        return self.size > 0 and score < method.enough and self.misses < method.patience and len(self.tried) < method.trials

    def learn(self, chosen: Set, score: float) -> None:
        self.tried.append((chosen, score))
        if len(chosen) < self.size:
            return
        if self.best is None:
            self.best = chosen, score
        elif chosen != self._again:
            if score <= max(self.best[1], *self._scores, 0.0):
                self.misses += 1
                return
            self._scores = []
        self._scores.append(score)
        self._again, self._due = chosen, len(self.tried) + APART
        mean, decided = sum(self._scores) / len(self._scores), len(self._scores) == TRIED
        if chosen == self.best[0]:
            self.best = chosen, mean
        elif mean <= self.best[1]:
            self.misses, decided = self.misses + 1, True
        elif decided:  # 3.
            self.best, self.misses = (chosen, mean), 0
        if decided:
            self._again, self._scores = None, []

    def next(self) -> Set:
        """4."""
        count = len(self.tried)
        if self._again is not None and count >= self._due:
            return self._again
        if self.size > 1 and count < self.halves:
            return (count,)
        if self.best is None:
            alone = [score for _, score in self.tried[: self.halves]] if self.size > 1 else [0.0] * self.halves
            return tuple(sorted(np.argsort([-score for score in alone], kind="stable")[: self.size].tolist()))
        dice = np.random.default_rng((self.method.seed, count))
        if (count + 1) % BAYES_EVERY:
            return self._near(dice)
        found = [self._near(dice) for _ in range(CANDIDATES // 2)]
        found += [tuple(sorted(dice.permutation(self.halves)[: self.size].tolist())) for _ in range(CANDIDATES // 2)]
        return found[int(np.argmax(self._bounds(found)))]

    def _near(self, dice: np.random.Generator) -> Set:
        """The best set with one to three halves exchanged."""
        assert self.best is not None
        inside = np.array(self.best[0])
        outside = np.setdiff1d(np.arange(self.halves), inside)
        count = min(int(dice.integers(1, 4)), len(inside), len(outside))
        left = np.setdiff1d(inside, dice.choice(inside, count, replace=False))
        return tuple(sorted([*left.tolist(), *dice.choice(outside, count, replace=False).tolist()]))

    def _bounds(self, sets: Seq[Set]) -> F64:
        """The mean and KAPPA deviations of a Gaussian process with a squared exponential kernel over the scores so far."""
        known = self.tried[-POINTS:]
        scores = np.array([score for _, score in known])
        x, new = self._points([chosen for chosen, _ in known]), self._points(sets)
        cross = _kernel(new, x)
        inverse = np.linalg.inv(_kernel(x, x) + NOISE * np.eye(len(x)))
        mean = scores.mean() + cross @ inverse @ (scores - scores.mean())
        spread = np.sqrt(np.maximum(1 - np.einsum("ij,jk,ik->i", cross, inverse, cross), 0)) * (scores.std() + 1e-6)
        bounds: F64 = mean + KAPPA * spread
        return bounds

    def _points(self, sets: Seq[Set]) -> F64:
        x = np.zeros((len(sets), self.halves))
        for row, chosen in zip(x, sets, strict=True):
            row[list(chosen)] = 1
        return x


def _kernel(a: F64, b: F64) -> F64:
    """Two sets that differ in one exchange are correlated by exp(-1/4)."""
    apart = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    found: F64 = np.exp(-apart / 8)
    return found


class Searching(Skipping):
    """The opened form. All requests share the search and its set."""

    def __init__(self, method: SWIFT, runner: Any, sampler: DraftSampler) -> None:
        super().__init__(method, runner, sampler)
        self.count, self.options = len(runner.spec.layers), method
        self.restore([])

    def snapshot(self) -> list[tuple[Set, float]]:
        return list(self.search.tried)

    def restore(self, snapshot: list[tuple[Set, float]]) -> None:
        self.search = Search(self.options, 2 * (self.count - 2))
        for chosen, score in snapshot:
            self.search.learn(chosen, score)
        self._use()

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        if self.search.active:
            self._try(seqs)
        return [EMPTY] * len(seqs) if self.search.best is None else super().propose(seqs, budgets)

    def _use(self) -> None:
        if self.search.best is not None:
            self.layers = self.without(self.search.best[0])

    def without(self, chosen: Set) -> Layers:
        skipped = [{half // 2 + 1 for half in chosen if half % 2 == kind} for kind in (0, 1)]
        attention, mlp = (frozenset(range(self.count)) - one for one in skipped)
        return Layers(attention, mlp)

    def _try(self, seqs: Seq[Sequence]) -> None:
        """Scores the next set on the first text that is long enough, if its keys are in the prefix cache and pages are free."""
        chosen = self.search.next()
        for seq in seqs:
            if seq.pending == 1 and seq.cache is PLAIN and seq.generated > self.options.window:
                if (score := self._score(seq, self.without(chosen))) is not None:
                    self.search.learn(chosen, score)
                    self._use()
                return

    def _score(self, seq: Sequence, layers: Layers) -> float | None:
        """2. None if that takes too many rows or pages."""
        size, memory, request = self.options.window, self.memory, seq.request
        before, last = seq.tokens[:-size], seq.tokens[-size:]
        matched = memory.match(before, request.salt)
        if len(before) - matched > 2 * memory.paged.table.page:
            return None
        plain = replace(request, params=request.params.but(prompt_logprobs=None), wants=Wants())
        text = Sequence(SCRATCH, plain, 0, before, len(before), seq.seed, sync_point=0)
        work, tree = [Work(text, len(before) - matched)], [TokenTree.chain(last[:-1])]
        if memory.need(text, len(seq.tokens), matched) + memory.idle_matched(before, request.salt) > memory.available():
            return None
        memory.open(text)
        try:
            memory.attach(text, matched)
            batch = Batch.pack(work, tree, memory.reserve(work, tree))
            out = self.runner.forward(replace(batch, layers=[layers]))
        finally:
            memory.discard(text)
            memory.free(text)
        return float((out.argmax == np.array(last)).mean())
