"""The target drafts with its lowest layers and its own head: from a depth that is measured, or from deeper where it is unsure.

DEL: Hossein Entezari Zarch, Lei Gao, Chaoyi Jiang, Murali Annavaram: DEL: Context-Aware Dynamic Exit Layer for Efficient
Self-Speculative Decoding, 2025, arXiv 2504.05598.

1. In some steps, what each exit would have drafted at the committed rows is compared with what the last layer says there. a_l is the
   share of rows where exit l is right, older rows count less, and an exit that was never seen is wrong.
2. Before each step choose the exit l and the length d with the most tokens a layer, (1 - a^(d+1)) / (1 - a) / (d l + L), with d = 0 for a
   step without a draft.
3. Draft d tokens, and stop after one whose probability is below the middle between the mean probabilities of right and of wrong rows.

S2D: Parsa Kavehzadeh, Mohammadreza Pourreza, Mojtaba Valipour, Tianshu Zhu, Haoli Bai, Ali Ghodsi, Boxing Chen, Mehdi
Rezagholizadeh: S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models, 2024, arXiv 2407.01955.

4. Draft a token with the first `shallow` layers; if its probability is below `sure`, with the first `deep` ones.

Differs: the head counts as the layers that have as many weights (DEL counts layers only). Rows are compared in every `every`-th step and
at `exits` exits, by the likeliest token at any temperature. Verification starts at the first layer. S2D drafts with a smaller model of
the target's family; here it is the target itself, and rows that go deeper run again from the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.layers import Layers
from redraft.core.plan import Budget, StepResult, Work
from redraft.core.sequence import Sequence
from redraft.core.spec import ModelSpec
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler
from redraft.draft.self_skip import LayerDrafter, Skipping
from redraft.draft.sketch import Sketch
from redraft.errors import InvalidInput
from redraft.ops.arrays import array, log_sum_exp, namespace
from redraft.ops.backend import argmax
from redraft.options import number

PROMPT_ROWS = 4  # rows of a chunk that are compared


def chain(tree: Sketch, length: int, stop: float) -> Iterator[None]:
    """At most `length` tokens, none after one with a probability below `stop`."""
    node = -1
    for more in reversed(range(min(length, tree.room))):
        distribution = tree.distribution(node)
        if (place := distribution.nth(0)) is None:
            return
        node = tree.add(node, place)
        if not more or not tree.open(node) or float(np.exp(distribution.logq[place])) < stop:
            return
        yield


def head_layers(spec: ModelSpec) -> float:
    """The head's weights, in layers."""
    layer = sum(prod(shape) for name, shape in spec.shapes().items() if name.startswith("layers.0."))
    return spec.vocab * spec.hidden / layer


# ---- DEL


@dataclass(frozen=True)
class DEL(LayerDrafter):
    """length: the most tokens of a draft; exits: depths that are measured, evenly spaced; every: steps between measurements; memory: what
    older rows count from one measurement to the next; head: whether the cost of the head counts, which the paper leaves out."""

    length: int = number(8, ge=1)
    exits: int = number(8, ge=1)
    every: int = number(16, ge=1)
    memory: float = number(0.95, ge=0, le=1)
    head: bool = True

    card: ClassVar[Card] = Card(
        "DEL",
        "Entezari Zarch, Gao, Jiang, Annavaram, DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, 2025, "
        "arXiv 2504.05598",
        Guarantee.SAME_TEXT,
        needs="a model trained for early exits; others are left to run without drafts",
        deviates="the head counts in the choice; some exits and steps are measured; verification starts at the first layer",
        summary="Drafts from a measured depth; models with early exits",
    )
    kind: ClassVar[Kind] = Kind.SINGLE

    def layers(self, count: int) -> frozenset[int]:
        if count < 2:
            raise InvalidInput(f"del: the target has {count} layer; 2 or more are needed")
        return frozenset(range(count))

    def open(self, runner: Any, sampler: Any) -> Measured:
        return Measured(self, runner, sampler)


def best(right: F64, exits: Seq[int], count: int, length: int, head: float = 0.0) -> tuple[int, int]:
    """2. The place in `exits` and the length with the most expected tokens a layer, of a target with `count` layers. right: a_l of each
    exit, below 1; head: its cost in layers. Ties go to the shorter draft and the lower exit."""
    d = np.arange(length + 1)[:, None]
    tokens = (1 - right ** (d + 1)) / (1 - right)
    each = tokens / (d * (np.array(exits) + head) + count + head)
    length_, place = np.unravel_index(int(each.argmax()), each.shape)
    return int(place), int(length_)


@dataclass
class Rows:
    """What was measured on one text, older rows less. rows: how many; for each exit right: those where it was right, sure and unsure: the
    sums of its probabilities where it was right and wrong."""

    rows: float
    right: F64
    sure: F64
    unsure: F64
    place: int = 0
    stop: float = 0.0


class Measured(Skipping):
    """The opened form of DEL. The state of a text is Rows."""

    def __init__(self, method: DEL, runner: Any, sampler: DraftSampler) -> None:
        super().__init__(method, runner, sampler)
        self.options, self.count = method, len(runner.spec.layers)
        measured = min(method.exits, self.count - 1)
        self.exits = [(i + 1) * self.count // (measured + 1) for i in range(measured)]
        self.cost = head_layers(runner.spec) if method.head else 0.0
        self.steps, self.due = 0, False

    @property
    def taps(self) -> Taps:  # type: ignore[override]
        """Of this step. Taps cut the pass into calls of a few layers, so most steps have none."""
        return Taps(hidden=frozenset(exit - 1 for exit in [*self.exits, self.count])) if self.due else NO_TAPS

    def begin(self, seq: Sequence) -> Rows:
        right, sure, unsure = np.zeros((3, len(self.exits)))
        return Rows(0.0, right, sure, unsure)

    def fork(self, state: Rows, seq: Sequence) -> Rows:
        return deepcopy(state)

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        states: list[Rows] = [seq.state[self] for seq in seqs]
        self.steps += 1
        self.due = self.steps % self.options.every == 0 or any(not state.rows for state in states)
        limited = []
        for state, budget in zip(states, budgets, strict=True):
            state.place, length = best(state.right / (state.rows + 1), self.exits, self.count, self.options.length, self.cost)
            right, wrong = state.right[state.place], state.rows - state.right[state.place]
            both = right > 0 and wrong > 0
            state.stop = 0.5 * float(state.sure[state.place] / right + state.unsure[state.place] / wrong) if both else 0.0
            limited.append(Budget(min(budget.rows, length), min(budget.depth, length)))
        return super().propose(seqs, limited)

    def grow(self, sketch: Sketch) -> Iterator[None]:
        return chain(sketch, self.options.length, sketch.seq.state[self].stop)  # 3.

    def layers_of(self, seq: Sequence) -> Layers:
        return Layers.whole(range(self.exits[seq.state[self].place]))

    def observe(self, result: StepResult) -> None:
        """1."""
        if not self.due:
            return
        batch, chosen = result.batch, []
        owners: list[Rows] = []
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            if (state := work.seq.state.get(self)) is not None:
                first = int(batch.tree_starts[s])
                rows = [*range(max(int(batch.starts[s]), first - PROMPT_ROWS), first), *(first + node for node in accepted.path)]
                chosen += rows
                owners += [state] * len(rows)
        if not chosen:
            return
        said, probability = self._said(result, np.array(chosen))
        right = said[:-1] == said[-1]
        for state in {id(owner): owner for owner in owners}.values():
            for old in (state.right, state.sure, state.unsure):
                old *= self.options.memory
            own = np.array([owner is state for owner in owners])
            state.rows = state.rows * self.options.memory + int(own.sum())
            state.right += (right & own).sum(1)
            state.sure += (probability[:-1] * (right & own)).sum(1)
            state.unsure += (probability[:-1] * (~right & own)).sum(1)

    def _said(self, result: StepResult, rows: Any) -> tuple[Any, F64]:
        """Of each exit and of the last layer: the likeliest token at these rows [exits + 1, rows], and its probability."""
        backend, weights = self.runner.backend, self.runner.weights
        with backend.mode():
            states = [result.out.hidden[exit - 1][rows] for exit in [*self.exits, self.count]]
            x = backend.norm(namespace(states[0]).concat(states, axis=0), weights.final_norm, self.runner.spec.final_norm)
            logits = backend.linear(x, weights.head)
            tokens = argmax(logits)
            most = array(logits)[np.arange(len(tokens)), tokens].astype(np.float64)
            sure = np.exp(most - np.array(log_sum_exp(logits)))
        return tokens.reshape(-1, len(rows)), sure.reshape(-1, len(rows))


# ---- S2D


@dataclass(frozen=True)
class S2D(LayerDrafter):
    """shallow, deep: layers that draft first, and where they are unsure, None: a quarter and a half of them; sure: the probability below
    which a token is drafted again; length: the most tokens of a draft; stop: the probability below which a draft ends."""

    shallow: int | None = number(None, ge=1)
    deep: int | None = number(None, ge=1)
    sure: float = number(0.7, ge=0, le=1)
    length: int = number(4, ge=1)
    stop: float = number(0.4, ge=0, le=1)

    card: ClassVar[Card] = Card(
        "S2D",
        "Kavehzadeh, Pourreza, Valipour, Zhu, Bai, Ghodsi, Chen, Rezagholizadeh, S2D: Sorted Speculative Decoding For More Efficient "
        "Deployment of Nested Large Language Models, 2024, arXiv 2407.01955",
        Guarantee.SAME_TEXT,
        needs="a model trained for early exits",
        deviates="the target's own layers instead of a smaller model of its family; rows that go deeper run again",
        summary="Drafts from two depths; models with early exits",
    )
    kind: ClassVar[Kind] = Kind.SINGLE

    def depths(self, count: int) -> tuple[int, int]:
        """Raises InvalidInput if they do not fit a target with `count` layers."""
        shallow = max(1, count // 4) if self.shallow is None else self.shallow
        deep = max(shallow, count // 2) if self.deep is None else self.deep
        if not shallow <= deep < count:
            raise InvalidInput(
                f"s2d:shallow={shallow},deep={deep}: the target has {count} layers; 1 <= shallow <= deep <= {count - 1} is needed"
            )
        return shallow, deep

    def layers(self, count: int) -> frozenset[int]:
        return frozenset(range(self.depths(count)[0]))

    def grow(self, tree: Sketch) -> Iterator[None]:
        return chain(tree, self.length, self.stop)

    def open(self, runner: Any, sampler: Any) -> Sorted:
        return Sorted(self, runner, sampler)


class Sorted(Skipping):
    """The opened form of S2D."""

    def __init__(self, method: S2D, runner: Any, sampler: DraftSampler) -> None:
        super().__init__(method, runner, sampler)
        self.sure = method.sure
        self.shallow, self.deep = (Layers.whole(range(depth)) for depth in method.depths(len(runner.spec.layers)))

    def _forward(self, works: list[Work], trees: list[TokenTree], *, wanted: bool = True) -> list[tuple[F64, float | None]] | None:
        """4. Each text runs one new row."""
        self.layers = self.shallow
        found = super()._forward(works, trees, wanted=wanted)
        assert found is not None
        unsure = [i for i, row in enumerate(found) if _probability(*row) < self.sure]
        if unsure and self.deep != self.shallow:
            for i in unsure:
                self.memory.discard(works[i].seq)  # its rows lack keys in the deeper layers
            self.layers = self.deep
            again = super()._forward([Work(works[i].seq, 1) for i in unsure], [trees[i] for i in unsure])
            assert again is not None
            ends = np.cumsum([1 + len(trees[i]) for i in unsure]).tolist()
            for i, end in zip(unsure, ends, strict=True):
                found[i] = again[end - 1]
        return found


def _probability(values: F64, total: float | None) -> float:
    """Of the likeliest token, before the request's processors."""
    best = float(values.max())
    return float(np.exp(best - (best + np.log(np.exp(values - best).sum()) if total is None else total)))
