"""Merges the offers of several drafters into trees and chooses how many nodes pay, for all sequences of a step together.

1. The offers at a place are merged: equal tokens are one candidate, with the evidence of all drafters that offer it.
2. The probability of a candidate comes from `Acceptance`; that of a path is the product along it.
3. Candidates of all sequences are taken best first. Each number k of drafted nodes gives the expected tokens of the step,
   texts + sum of the path probabilities, and its time cost(rows + k). The k with the most tokens per second is drafted, also 0. All k
   are looked at, because costs have steps, until no further node can win.
4. After the step, every place on the accepted path corrects `Acceptance`, and the time of the step corrects the cost model.
5. The longer a text keeps no drafted token, the more rarely it is looked at, because looking takes time too. A text whose drafters
   have all stopped is not looked at until one of them is tried again.

The greedy tree is that of DySpec (Yunfan Xiong, Ruoyu Zhang, Yanzeng Li, Lei Zou: DySpec: Faster Speculative Decoding with Dynamic
Token Tree Structure, 2024, arXiv 2410.11744). The choice by time follows Sequoia (Zhuoming Chen, Avner May, Ruslan Svirschevski,
Yuhsun Huang, Max Ryabinin, Zhihao Jia, Beidi Chen: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2024,
arXiv 2402.12374).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from redraft.core.cost import CostModel
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.acceptance import Acceptance, Candidate
from redraft.draft.drafter import OpenDrafter, Seconds, Wrapper
from redraft.draft.payoff import Payoff, Prices
from redraft.draft.source import Source, Trees, source_of

CACHED = 512
MEASURED = (*((rows, 0) for rows in (1, 2, 3, 4, 5, 6, 8, 12, 16)), (1, CACHED), (8, CACHED))  # rows and cached tokens of timed steps
ROUNDS = 7  # how often each is timed
MOOD_RATE, LARGEST_MOOD = 0.1, 3.0
MARGIN = 0.02  # of speed that a draft must promise: smaller gains are lost in errors of the estimates
LIKELIEST = 0.9  # chance of a child, before it is known
FALL = 0.85  # of the next node's probability from node to node, at least, where the search asks whether a further one can pay
AHEAD = 48  # further nodes that the search looks ahead
FURTHER = [(1 - FALL**m) / (1 - FALL) for m in range(AHEAD + 1)]  # the sum of so many further ones, relative to the first
FIXED_NODES = 4  # drafted nodes a sequence where time must not decide
QUIET = 8  # a text that kept nothing for n steps rests for n // q of them; q is QUIET, or less so that
LOOKS = 0.5  # q looks take at most so many steps
LONGEST_REST, LOOKING = 15, 0.01  # steps that it rests at most, fewer if looks then take less than this share of all time
LOOK_RATE = 0.1  # weight of a step in the mean share of drafting


class Node:
    """A drafted token. score: probability of its path; origin: the first drafter that offered it; index: its place in the tree of its
    sequence; places: where each drafter continues, None where it knows nothing; offered: the candidates below, None before they were
    asked for; below: the candidates that became nodes, by token."""

    __slots__ = ("below", "depth", "index", "mood", "offered", "origin", "parent", "places", "score", "sequence", "token")

    def __init__(self, sequence: int, token: int, parent: Node | None, score: float, origin: int) -> None:
        self.sequence, self.token, self.parent, self.score, self.origin = sequence, token, parent, score, origin
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.mood: float = 0.0 if parent is None else parent.mood
        self.index = -1
        self.places: list[Any] = []
        self.offered: list[Candidate] | None = None
        self.below: dict[int, Node] = {}


Entry = tuple[float, int, Node, Candidate | None]
"""-score, order, and what can be taken with this score: a candidate below the node, or None: its best child may have this score."""


class States(list[Any]):
    """The states of the drafters for one request, and what each of them has paid so far."""

    payoff: Payoff
    quiet: int = 0  # steps since a drafted token was kept
    learned: int = 0  # tokens when the payoff last learned a step; a step without drafts has one
    root: Node | None = None  # of the last draft
    mood: float = 0.0  # added to the log-odds of every candidate: this text is more or less predictable than others


class Planner(Wrapper):
    """The opened drafter. names, parts: the drafters, those that come first own shared nodes; cost: of a step; timed: whether time may
    decide. Where the verifier tosses coins, a tree that depends on time would bias them, so the trees have a fixed size."""

    kinds: frozenset[Kind]

    def __init__(
        self,
        names: Seq[str],
        parts: Seq[OpenDrafter],
        cost: CostModel,
        *,
        timed: bool = True,
        clock: Callable[[], float] = perf_counter,
        acceptance: Acceptance | None = None,
    ) -> None:
        super().__init__(parts)
        self.names, self.cost, self.timed = names, cost, timed
        self.clock = self.timer = clock  # of steps, and of single drafters
        self.sources: list[Source] = [source_of(part) for part in parts]
        self.trees = {i: source for i, source in enumerate(self.sources) if isinstance(source, Trees)}
        self.acceptance = acceptance or Acceptance(names, self.sources)
        self.kinds = frozenset({Kind.FIXED})
        self._began = self._spent = self._observed = 0.0  # when the step began, and the time that drafting and learning took
        self._apart = 0.0  # of this, what was charged to single drafters
        self._order = count()
        self._share = 0.05  # of drafting in the time of a step
        self._stepped = False  # whether a step was made: a kept cost model knows times before
        self._left = list(MEASURED)  # sizes that this round has not timed yet
        self._round: dict[tuple[int, int], float] = {}

    # ---- a request

    def begin(self, seq: Sequence) -> States:
        return self._with_payoff(States(super().begin(seq)))

    def fork(self, state: list[Any], seq: Sequence) -> States:
        return self._with_payoff(States(super().fork(state, seq)))

    def _with_payoff(self, states: States) -> States:
        states.payoff = Payoff(len(self.parts))
        return states

    def stopped(self, seq: Sequence) -> list[str]:
        """The drafters that do not pay for this request at the moment."""
        return [self.names[i] for i in seq.state[self].payoff.stopped] if self in seq.state else []

    # ---- a step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        self._began, self._apart = self.clock(), 0.0
        if self.timed:
            quiet, longest = self._rhythm()
            for seq, budget in zip(seqs, budgets, strict=True):
                if min(budget) > 0:  # 5.
                    state = seq.state[self]
                    seq.rest = min(state.quiet // quiet, longest)
                    state.quiet += 1 + seq.rest
        trees = self._plan(seqs, budgets)
        self._spent = self.clock() - self._began
        return trees

    def _rhythm(self) -> tuple[int, int]:
        """After how many quiet steps a text rests for one, and the longest rest."""
        return max(1, min(QUIET, int(LOOKS / max(self._share, LOOKING)))), min(LONGEST_REST, int(self._share / LOOKING))

    def _plan(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = [EMPTY] * len(seqs)
        heap: list[Entry] = []
        given = self._given([seq for seq, budget in zip(seqs, budgets, strict=True) if min(budget) > 0])
        rows = cached = limit = 0
        for s, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            states: States = seq.state[self]
            states.root = None
            rows += seq.pending
            cached += seq.stored
            if min(budget) > 0 and (active := states.payoff.active()):
                root = states.root = Node(s, -1, None, 1.0, 0)
                root.mood = states.mood
                root.places = [
                    None if i not in active else given[i, seq.id] if i in self.trees else source.start(seq)
                    for i, source in enumerate(self.sources)
                ]
                self._expand(root, heap)
                limit += budget.rows if self.timed else min(budget.rows, FIXED_NODES)
        if heap:
            for s, nodes in self._chosen(heap, budgets, rows, cached, limit).items():
                trees[s] = self._tree(nodes)
        return trees

    def _starts(self, part: int, seqs: Seq[Sequence]) -> tuple[list[Any], float]:
        """The places of a drafter of trees, and the seconds that it took for each text. It may be slow, and pays for itself."""
        began = self.timer()
        places = self.trees[part].starts(seqs)
        seconds = self.timer() - began
        self._apart += seconds
        return places, seconds / len(seqs)

    def _given(self, seqs: Seq[Sequence]) -> dict[tuple[int, int], Any]:
        """The places of the drafters of trees, by drafter and text."""
        found: dict[tuple[int, int], Any] = {}
        for part in self.trees:
            if asked := [seq for seq in seqs if part in seq.state[self].payoff.active()]:
                places, seconds = self._starts(part, asked)
                for seq, place in zip(asked, places, strict=True):
                    seq.state[self].payoff.charge(part, seconds)
                    found[part, seq.id] = place
        return found

    def _expand(self, node: Node, heap: list[Entry]) -> None:  # 1. and 2.
        """Asks the drafters for the candidates below a node."""
        acceptance, sources = self.acceptance, self.sources
        if node.parent is not None:
            token, above = node.token, node.parent.places
            node.places = [None if place is None else source.follow(place, token) for source, place in zip(sources, above, strict=True)]
        asked, bit = 0, 1
        merged: dict[int, list[int]] = {}  # token -> the drafters that offer it, as bits, and their features
        for source, place, first in zip(sources, node.places, acceptance.first, strict=True):
            if place is not None and (offers := source.offers(place)):
                asked |= bit
                for token, bucket in offers:
                    if token in merged:
                        found = merged[token]
                        found[0] |= bit
                        found.append(first + bucket)
                    else:
                        merged[token] = [bit, first + bucket]
            bit += bit
        candidates = node.offered = acceptance.candidates(node.depth + 1, asked, merged, node.mood)
        total = 0.0
        for candidate in candidates:
            total += candidate[1]
        scale = -node.score if total <= 1 else -node.score / total
        for candidate in candidates:
            heappush(heap, (scale * candidate[1], next(self._order), node, candidate))

    def _chosen(self, heap: list[Entry], budgets: Seq[Budget], rows: int, cached: int, limit: int) -> dict[int, list[Node]]:
        """The nodes to draft of each sequence, parents first."""  # 3.
        texts = len(budgets)
        if self.timed:
            fixed, each = self.cost.line(cached, texts)
            times = [self.cost.relative(rows + k) + fixed + each * (rows + k) for k in range(limit + 1)]
        else:
            times = [1.0] * (limit + 1)
        taken: list[Node] = []
        used = [0] * texts
        most = [budget.rows if self.timed else min(budget.rows, FIXED_NODES) for budget in budgets]
        expected, best, best_count = float(texts), (1 + MARGIN) * texts / times[0], 0
        while heap and len(taken) < limit:
            score, _, parent, candidate = heappop(heap)
            s, k = parent.sequence, len(taken)
            if used[s] == most[s]:
                continue
            gain = -score  # no later node is likelier
            for m in range(1, min(limit - k, AHEAD) + 1):
                if expected + gain * FURTHER[m] > best * times[k + m]:
                    break
            else:
                break
            if candidate is None:
                self._expand(parent, heap)
                continue
            token, _, _, agreed = candidate
            node = parent.below[token] = Node(s, token, parent, gain, (agreed & -agreed).bit_length() - 1)
            taken.append(node)
            used[s] += 1
            expected += gain
            if expected > best * times[k + 1]:
                best, best_count = expected / times[k + 1], k + 1
            if node.depth < budgets[s].depth:
                heappush(heap, (score * LIKELIEST, next(self._order), node, None))
        chosen: dict[int, list[Node]] = {}
        for node in taken[:best_count]:
            nodes = chosen.setdefault(node.sequence, [])
            node.index = len(nodes)
            nodes.append(node)
        return chosen

    def _tree(self, nodes: list[Node]) -> TokenTree:
        return TokenTree(
            np.array([node.token for node in nodes], np.int32),
            np.array([node.parent.index for node in nodes], np.int32),  # type: ignore[union-attr]
            np.zeros(len(nodes) + 1, np.uint8),
            origins=np.array([node.origin for node in nodes], np.uint16),
            scores=np.array([node.score for node in nodes], np.float32),
        )

    def observe(self, result: StepResult) -> None:  # 4.
        began = self.clock()
        super().observe(result)
        for s, work in enumerate(result.work):
            if result.accepted[s].path and self in work.seq.state and result.own(s)[1]:
                work.seq.state[self].quiet = work.seq.rest = 0
        self._learn(result, self._prices(result, began) if self.timed else None)
        self._observed = self.clock() - began

    def _prices(self, result: StepResult, began: float) -> Prices | None:
        """What the step cost, for the payoff of each request; the cost model learns it. None if prompts were read too."""
        rows, texts = len(result.batch.tokens), len(result.work)
        drafted = sum([len(tree) for tree in result.trees])
        if rows - drafted != texts:
            return None
        cached = sum([work.seq.stored for work in result.work]) - texts
        cost = self.cost
        cost.observe(rows, cached, texts, began - self._began - self._spent)
        self._stepped = True
        plain = cost.seconds(texts, cached, texts) or 0.0
        node = ((cost.seconds(rows, cached, texts) or 0.0) - plain) / drafted if drafted else 0.0
        drafting = max(0.0, self._spent - self._apart) + self._observed
        if plain:
            self._share += LOOK_RATE * (drafting / plain - self._share)
        return Prices(plain / texts, node, drafting / texts)

    def _learn(self, result: StepResult, prices: Prices | None) -> None:
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            seq = work.seq
            states: States | None = seq.state.get(self)
            if states is None:
                continue
            node, surprise = states.root, 0.0
            for token in accepted.tokens:
                if node is None or node.offered is None:
                    break
                surprise += self.acceptance.learn(node.depth + 1, node.offered, token)
                node = node.below.get(token)
            states.mood = min(max(states.mood + MOOD_RATE * surprise, -LARGEST_MOOD), LARGEST_MOOD)
            if prices is not None:
                steps = 1 + len(seq.tokens) - len(accepted.tokens) - states.learned
                states.payoff.add(*result.own(s), prices, steps)
                states.learned = len(seq.tokens)
                seq.rest = max(seq.rest, states.payoff.wait)

    def idle(self, seconds: Seconds) -> bool:
        """Times one step, until the cost model has seen ROUNDS rounds. Begins only after a first reply. A round counts at once."""
        cost = self.cost
        if len(cost.rounds) >= ROUNDS or not self._stepped or not self.timed:
            return super().idle(seconds)
        size = self._left.pop(0)
        if (found := seconds(*size)) is not None:
            self._round[size] = found
        elif size == MEASURED[0]:
            self._left.insert(0, size)
            return super().idle(seconds)  # not even one row fits now
        if not self._left:
            cost.add_round(self._round)
            self._left, self._round = list(MEASURED), {}
        return True

    # ---- what it learned

    def snapshot(self) -> Any:
        return super().snapshot(), self.acceptance.snapshot()

    def restore(self, snapshot: Any) -> None:
        parts, weights = snapshot
        if parts is not None:
            super().restore(parts)
        self.acceptance.restore(weights)
