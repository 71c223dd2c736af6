"""The planner in compiled form (native/planner.cpp): the same nodes, in a tenth of the time.

All drafters that offer single tokens must have a compiled form; the others take part with their trees. planner.py is the reference.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import numpy as np

from redraft.core.cost import ROWS
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import OpenDrafter
from redraft.draft.payoff import Prices
from redraft.draft.planner import Planner
from redraft.draft.source import Compiled, Source

NUMBER, SIZE, POINTER, REAL = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
SIGNATURES: dict[str, tuple[Any, ...]] = {  # the type of the result, then those of the arguments
    "rd_trees": (POINTER,),
    "rd_source_free": (None, POINTER),
    "rd_source_units": (SIZE, POINTER),
    "rd_source_snapshot": (POINTER, POINTER),
    "rd_source_restore": (None, POINTER, POINTER),
    "rd_memory_free": (None, POINTER),
    "rd_planner": (POINTER, NUMBER, POINTER, POINTER, POINTER, POINTER),
    "rd_planner_free": (None, POINTER),
    "rd_text": (POINTER, POINTER, SIZE, ctypes.c_char_p, SIZE, SIZE),
    "rd_text_end": (None, POINTER, POINTER, POINTER, SIZE),
    "rd_give": (None, POINTER, POINTER, NUMBER, POINTER, POINTER, POINTER, NUMBER),
    "rd_charge": (None, POINTER, NUMBER, REAL),
    "rd_plan_drafts": (SIZE, POINTER, POINTER, NUMBER, POINTER, POINTER, SIZE, POINTER),
    "rd_learn_drafts": (None, POINTER, POINTER, NUMBER, POINTER, POINTER, REAL, REAL, REAL),
}


class Cost(ctypes.Structure):
    _fields_ = [("times", POINTER), ("known", SIZE), ("more", REAL), ("fixed", REAL), ("each", REAL)]


class Output(ctypes.Structure):
    _fields_ = [("tokens", POINTER), ("parents", POINTER), ("origins", POINTER), ("scores", POINTER), ("counts", POINTER)]


UNKNOWN = Prices(-1.0, 0.0, 0.0)


@cache
def bind(library: ctypes.CDLL) -> ctypes.CDLL | None:
    """Declares the types of the functions. None if the library is too old to have them."""
    for name, (returned, *taken) in SIGNATURES.items():
        if not hasattr(library, name):
            return None
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library


def fits(part: OpenDrafter) -> bool:
    """Whether it has a compiled form or takes part with its trees."""
    return hasattr(part, "compiled") or not isinstance(part, Source)


class State(list[Any]):
    """The states of the drafters without a whole compiled form. text: the address of the compiled state, 0 after the end; seen: the tokens
    that it has; active: the drafters that may draft, as bits; quiet, learned: see planner.States."""

    text = seen = active = quiet = learned = 0
    seq: Sequence


class CompiledPlanner(Planner):
    """library: bound; see Planner."""

    def __init__(self, library: ctypes.CDLL, names: Seq[str], parts: Seq[OpenDrafter], cost: Any, **given: Any) -> None:
        super().__init__(names, parts, cost, **given)
        self.c = library
        compiled = [getattr(part, "compiled", None) for part in parts]
        self.forms = [make(library) if make else Compiled(library.rd_trees(), False) for make in compiled]
        self.parts = tuple(part for part, form in zip(parts, self.forms, strict=True) if not form.whole)
        self._kept = [*parts, self.acceptance]  # compiled code reads their arrays
        sources = (ctypes.c_void_p * len(parts))(*(form.source for form in self.forms))
        first = np.array(self.acceptance.first, np.int32)
        self.all = (1 << len(parts)) - 1
        self.price = Cost(known=ROWS)
        self._price = ctypes.byref(self.price) if self.timed else None
        self.planner = library.rd_planner(
            len(parts), sources, address(self.acceptance.weights), address(self.acceptance.counts), first.ctypes.data
        )
        weakref.finalize(self, _free, library, self.planner, [form.source for form in self.forms])
        self._room(256, 16)

    def _room(self, nodes: int, texts: int) -> None:
        """Makes room for the results of a plan."""
        self.found = [np.empty(nodes, kind) for kind in (np.int32, np.int32, np.uint16, np.float32)]
        self.counts = np.empty(texts, np.int32)
        self._out = ctypes.byref(Output(*(one.ctypes.data for one in (*self.found, self.counts))))

    @property
    def bytes(self) -> int:
        whole: int = sum(form.unit * self.c.rd_source_units(form.source) for form in self.forms if form.unit)
        return super().bytes + whole

    # ---- a request

    def begin(self, seq: Sequence) -> Any:
        return self._started(seq, super(Planner, self).begin(seq))

    def fork(self, state: list[Any], seq: Sequence) -> Any:
        return self._started(seq, super(Planner, self).fork(state, seq))

    def _started(self, seq: Sequence, states: list[Any]) -> State:
        state = State(states)
        state.seq, state.active = seq, self.all
        salt = seq.request.salt.encode("utf-8", "surrogatepass")
        state.text = self.c.rd_text(self.planner, seq.id, salt, len(salt), seq.prompt_len)
        return state

    def end(self, state: Any) -> None:
        if state.text:
            fresh = array("i", state.seq.tokens[state.seen :])
            self.c.rd_text_end(self.planner, state.text, address(fresh), len(fresh))
            state.text = 0
        super().end(state)

    def stopped(self, seq: Sequence) -> list[str]:
        state = seq.state.get(self)
        return [] if state is None else [name for i, name in enumerate(self.names) if not state.active >> i & 1]

    # ---- a step

    def _plan(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        asked: list[int] = []
        fresh: list[int] = []
        asking: list[Sequence] = []
        rows = cached = room = 0
        for seq, (most, depth) in zip(seqs, budgets, strict=True):
            state: State = seq.state[self]
            tokens, stored = seq.tokens, seq.stored
            count = len(tokens)
            rows += count - stored
            cached += stored
            new = count - state.seen
            if most <= 0 or depth <= 0:
                new = most = 0
            elif new:
                fresh += tokens[state.seen :]
            room += most
            asked += (state.text, most, depth, new)
            if self.trees and most and state.active:
                asking.append(seq)
        if asking:
            self._give(asking)
        if room > len(self.found[0]) or len(seqs) > len(self.counts):
            self._room(2 * room, 2 * len(seqs))
        if self.timed:
            model = self.cost
            self.price.times, self.price.more = address(model.times), model.more
            self.price.fixed, self.price.each = model.line(cached, len(seqs))
        table, read = array("q", asked), array("i", fresh)
        nodes = self.c.rd_plan_drafts(self.planner, address(table), len(seqs), address(read), self._price, rows, self._out)
        for seq, new in zip(seqs, asked[3::4], strict=True):
            seq.state[self].seen += new
        trees = [EMPTY] * len(seqs)
        at = 0
        for s, count in enumerate(self.counts[: len(seqs)].tolist() if nodes else ()):
            if count:
                own: list[Any] = [one[at : at + count].copy() for one in self.found]
                trees[s] = TokenTree(own[0], own[1], np.zeros(count + 1, np.uint8), origins=own[2], scores=own[3])
                at += count
        return trees

    def _give(self, seqs: Seq[Sequence]) -> None:
        """Passes on the trees of the drafters that have no compiled form."""
        for part in self.trees:
            asked = [(seq, seq.state[self].text) for seq in seqs if seq.state[self].active >> part & 1]
            if not asked:
                continue
            places, seconds = self._starts(part, [seq for seq, _ in asked])
            for (_, text), place in zip(asked, places, strict=True):
                self.c.rd_charge(text, part, seconds)
                if place is not None:
                    tree, buckets = place[0].tree, place[0].buckets
                    parents, own = np.ascontiguousarray(tree.parents), np.ascontiguousarray(tree.tokens)  # a drafter may return views
                    self.c.rd_give(self.planner, text, part, parents.ctypes.data, own.ctypes.data, buckets.ctypes.data, len(tree))

    def _learn(self, result: StepResult, prices: Prices | None) -> None:
        learning: list[tuple[Sequence, State]] = []
        came: list[int] = []
        tokens: list[int] = []
        paths: list[int] = []
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            state: State | None = work.seq.state.get(self)
            if state is not None:
                seq, new = work.seq, len(accepted.tokens)
                tree, path = result.own(s)
                learning.append((seq, state))
                came += (state.text, new, len(tree), len(path), 1 + len(seq.tokens) - new - state.learned, 0, 0)
                tokens += accepted.tokens
                paths += path
        table, read, kept = array("q", came), array("i", tokens), array("i", paths)
        self.c.rd_learn_drafts(self.planner, address(table), len(learning), address(read), address(kept), *(prices or UNKNOWN))
        for (seq, state), active, wait in zip(learning, table[5::7], table[6::7], strict=True):
            state.active = active
            if prices is not None:
                seq.rest = max(seq.rest, wait)
                state.learned = len(seq.tokens)

    # ---- what it learned

    def snapshot(self) -> Any:
        whole = [self.c.rd_source_snapshot(form.source) if form.whole else None for form in self.forms]
        memories = [None if memory is None else Memory(self.c, memory) for memory in whole]
        return memories, super().snapshot()

    def restore(self, snapshot: Any) -> None:
        memories, rest = snapshot
        for form, memory in zip(self.forms, memories, strict=True):
            if memory is not None:
                self.c.rd_source_restore(form.source, memory.address)
        super().restore(rest)


class Memory:
    """What a compiled form had learned."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.address = address
        weakref.finalize(self, library.rd_memory_free, address)


def address(values: array[Any]) -> int:
    """Of its numbers."""
    found: int = values.buffer_info()[0]
    return found


def _free(library: ctypes.CDLL, planner: int, sources: Seq[int]) -> None:
    library.rd_planner_free(planner)
    for source in sources:
        library.rd_source_free(source)
