"""Begin and end are always paired. Whatever raises, no page leaks, no token is lost and the engine goes on."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar

import pytest

from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.plan import Accepted, Budget, StepResult
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import Kind, TokenTree
from redraft.draft.drafter import Stateless
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import Unsupported
from redraft.verify.coupled import Coupled
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, truth

SAMPLED = SamplingParams(temperature=0.9, seed=31, max_tokens=30)


class Bang(Exception):
    pass


class Counting(Stateless):
    """Counts its begins and ends, and raises on the given call of a method: {"propose": 3}."""

    def __init__(self, inner: Any, error: type[BaseException] = Bang, **raises: int) -> None:
        self.inner, self.raises, self.error = inner, raises, error
        self.calls: dict[str, int] = {}
        self.begun = self.ended = 0
        self.open: set[int] = set()

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.raises.get(name) == self.calls[name]:
            raise self.error(name)

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        self._count("propose")
        assert all(seq.state[self] in self.open for seq in seqs)
        return self.inner.propose(seqs, budgets)

    def observe(self, result: StepResult) -> None:
        self._count("observe")

    def begin(self, seq: Sequence) -> int:
        self._count("begin")
        self.begun += 1
        self.open.add(self.begun)
        return self.begun

    def fork(self, state: int, seq: Sequence) -> int:
        assert state in self.open
        return self.begin(seq)

    def end(self, state: int) -> None:
        self.open.remove(state)  # KeyError: ended twice
        self.ended += 1


def counting(error: type[BaseException] = Bang, known: Any = None, **raises: int) -> Counting:
    return Counting(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=known), error, **raises)


def requests(count: int = 4, **changes: Any) -> list[Request]:
    return [Request(str(i), PROMPT[i:], SAMPLED.but(**changes)) for i in range(count)]


def go(made: Engine, reported: dict[str, list[int]], error: type[BaseException] = Bang) -> int:
    """Steps until nothing is left. Returns how often a step raised."""
    raised = steps = 0
    while made.has_work:
        steps += 1
        assert raised < 10 and steps < 2000, "no progress"
        try:
            for event in checked(made.step()):
                reported.setdefault(event.request.id, []).extend(event.tokens)
        except error:
            raised += 1
        made.memory.check()
    return raised


TEXTS = {str(i): truth(SAMPLED, PROMPT[i:], new=30) for i in range(4)}
KNOWN = {(name, 0): text for name, text in TEXTS.items()}


def paired(drafter: Counting) -> None:
    assert drafter.begun == drafter.ended > 0 and not drafter.open


@pytest.mark.parametrize("pool", [40, 5])
def test_begin_and_end_are_paired(pool: int) -> None:
    drafter = counting(known=KNOWN)
    made = engine(drafter, pool=pool)
    for request in requests():
        made.add(request)
    reported: dict[str, list[int]] = {}
    go(made, reported)
    assert reported == TEXTS and bool(made.preemptions) == (pool == 5)
    paired(drafter)
    assert drafter.begun == 4 + made.preemptions


@pytest.mark.parametrize("pool", [40, 5])
def test_begin_and_end_are_paired_under_n_and_abort(pool: int) -> None:
    drafter = counting()
    made = engine(drafter, pool=pool)
    for request in requests(3, n=3):
        made.add(request)
    for _ in range(8):
        made.step()
    assert made.abort("1")
    go(made, {})
    paired(drafter)
    assert made.memory.used() == 0


@pytest.mark.parametrize("name", ["propose", "observe", "begin"])
@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt])
def test_a_drafter_that_raises_harms_nobody(name: str, call: int, error: type[BaseException]) -> None:
    drafter = counting(error, KNOWN, **{name: call})
    made = engine(drafter, chunk=40)
    for request in requests():
        made.add(request)
    reported: dict[str, list[int]] = {}
    assert go(made, reported, error) == (error is KeyboardInterrupt)  # anything else is reported in the statistics: test_guard.py
    assert reported == TEXTS
    paired(drafter)
    assert made.memory.used() == 0 and not made.outputs


@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt])
def test_a_fork_that_raises_harms_nobody(error: type[BaseException]) -> None:
    drafter = counting(error, begin=2)  # the second begin is the first fork's
    made = engine(drafter)
    made.add(Request("r", PROMPT, SAMPLED.but(n=3)))
    reported: dict[str, list[int]] = {}
    assert go(made, reported, error) == (error is KeyboardInterrupt)
    paired(drafter)
    assert len(reported["r"]) == 3 * 30
    assert made.memory.used() == 0 and not made.outputs


@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt])
def test_an_observe_that_raises_at_the_sync_point_does_not_stop_the_fork(error: type[BaseException]) -> None:
    drafter = counting(error, observe=1)  # the prompt's first step ends at the sync point of n > 1
    made = engine(drafter)
    made.add(Request("r", PROMPT, SAMPLED.but(n=3)))
    reported: dict[str, list[int]] = {}
    assert go(made, reported, error) == (error is KeyboardInterrupt)
    assert len(reported["r"]) == 3 * 30
    paired(drafter)


@pytest.mark.parametrize("place", ["forward", "distribution", "accept"])
@pytest.mark.parametrize("call", [1, 3, 9])
def test_an_interrupt_in_mid_step_loses_nothing(place: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = counting(known=KNOWN)
    made = engine(drafter, chunk=40)
    owner = {"forward": made.runner, "distribution": made.sampler, "accept": Coupled}[place]
    count = 0

    def interrupted(right: Any) -> Any:
        def wrong(*args: Any) -> Any:
            nonlocal count
            count += 1
            out = right(*args)  # Ctrl-C after the keys were written
            if count == call:
                raise KeyboardInterrupt
            return out

        return wrong

    monkeypatch.setattr(owner, place, interrupted(getattr(owner, place)))
    for request in requests():
        made.add(request)
    reported: dict[str, list[int]] = {}
    assert go(made, reported, KeyboardInterrupt) == 1
    assert reported == TEXTS
    paired(drafter)
    assert made.memory.used() == 0


def test_a_verifier_that_cannot_undo_the_drafters_children_is_refused() -> None:
    class Narrow(Coupled):
        supports: ClassVar[frozenset[Kind]] = frozenset({Kind.IID})
        card: ClassVar[Card] = Card("Narrow", "", Guarantee.SAME_DISTRIBUTION)

        def accept(self, trees: Seq[TokenTree], distribution: Any) -> list[Accepted]:
            raise AssertionError

    made = engine()
    with pytest.raises(Unsupported, match=r"Narrow does not support.*FIXED") as refused:
        Engine(made.runner, made.scheduler, made.drafter.own.drafter, Narrow(), made.sampler, max_model_len=64)
    assert "\n" not in str(refused.value)


def test_a_begin_that_raises_behind_a_newcomer_at_its_sync_point_stalls_nobody() -> None:
    """A prompt of one token with n > 1 starts at its sync point. The next admission raises before it can fork."""
    drafter = counting(KeyboardInterrupt, begin=2)
    made = engine(drafter)
    made.add(Request("one", PROMPT[:1], SAMPLED.but(n=2)))
    made.add(Request("two", PROMPT, SAMPLED))
    reported: dict[str, list[int]] = {}
    assert go(made, reported, KeyboardInterrupt) == 1
    assert len(reported["one"]) == 2 * 30 and len(reported["two"]) == 30
    paired(drafter)


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    made = engine(counting(), max_seqs=1)
    request = Request("r", (PROMPT * 20)[:90], SAMPLED.but(n=3))
    made.add(request)
    go(made, {})
    assert request.cached_tokens == 0
