"""If a part raises for one text, only that request ends with the error. Plugin states end, no page leaks, and the engine goes on. A
step never raises an Exception."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import CachePlan, FinishReason, Lanes, Pooling, Request, Sequence, Wants
from redraft.engine.engine import Engine
from redraft.engine.output import Event
from redraft.kv.eviction import eviction as seam
from redraft.models.runner import Runner
from redraft.ops.backend import Linear
from redraft.sample.sampler import NotNumbers, Sampler
from tests.arrays import DEFINITION, placed
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, truth
from tests.engine.test_plugins import SAMPLED, Bang, Counting

COUNT = 4
TEXTS = {str(i): truth(SAMPLED, PROMPT[i:], new=30) for i in range(COUNT)}
KNOWN = {(name, 0): text for name, text in TEXTS.items()}
CULPRIT = "2"
Ended = dict[str, Exception]


class Recorder(seam.StatelessEviction):
    """A keep policy that evicts nothing and counts calls. It raises in the named method, for one request, at the given call."""

    lanes = Lanes.SHARED

    def __init__(self, method: str = "", call: int = 1, error: type[Exception] = Bang, who: str = CULPRIT) -> None:
        self.method, self.call, self.error, self.who = method, call, error, who
        self.calls = self.begun = 0
        self.open: set[int] = set()

    def _met(self, method: str, request: str) -> None:
        if (method, request) == (self.method, self.who):
            self.calls += 1
            if self.calls >= self.call:
                raise self.error(method)

    def begin(self, seq: Sequence) -> tuple[int, str]:
        self._met("begin", seq.request.id)
        self.begun += 1
        self.open.add(self.begun)
        return self.begun, seq.request.id

    def fork(self, state: tuple[int, str], seq: Sequence) -> tuple[int, str]:
        self._met("fork", seq.request.id)
        return self.begin(seq)

    def end(self, state: tuple[int, str]) -> None:
        self.open.remove(state[0])  # KeyError: ended twice
        self._met("end", state[1])

    def sync_point(self, seq: Sequence) -> int:
        self._met("sync_point", seq.request.id if seq.stored else "")
        return (seq.stored // 8 + 1) * 8

    def watch(self, seq: Sequence) -> tuple[Any, ...]:
        return ()

    def observe(self, seq: Sequence, seen: Any, rows: int, path: Seq[int]) -> None:
        self._met("observe", seq.request.id)

    def decide(self, seq: Sequence, positions: Any) -> None:
        self._met("decide", seq.request.id)


def with_policy(made: Engine, keep: Recorder) -> Engine:
    """All requests of this engine choose `keep`."""
    own = made.policies.fit

    def fit(seq: Sequence) -> None:
        own(seq)
        seq.cache = CachePlan(keep)  # type: ignore[arg-type]

    made.policies.fit = fit  # type: ignore[method-assign]
    return made


def go(made: Engine, reported: dict[str, list[int]], drain: int = 2000) -> Ended:
    """Steps until nothing is left. Returns the error of each request that failed."""
    ended: Ended = {}
    reasons: dict[str, list[FinishReason]] = {}

    def hear(events: list[Event]) -> None:
        for event in events:
            assert event.request.id not in ended, "an event of a text that was ended"
            if event.error is not None:
                assert not event.tokens and event.reason is None
                ended[event.request.id] = event.error
                continue
            reported.setdefault(event.request.id, []).extend(event.tokens)
            assert len(event.drafted) == len(event.tokens)
            if event.reason is not None:
                reasons.setdefault(event.request.id, []).append(event.reason)

    for _ in range(drain):
        if not made.has_work:
            break
        hear(made.step())
        made.memory.check()
    assert not made.has_work, "it does not end"
    assert made.memory.used() == 0 and not made.outputs and not made.faults.found and not made.events
    assert all(reasons.get(name) for name in reported if name not in ended)
    return ended


def add(made: Engine, count: int = COUNT, **changes: Any) -> list[Request]:
    requests = [Request(str(i), PROMPT[i:], SAMPLED.but(**changes)) for i in range(count)]
    for request in requests:
        made.add(request)
    return requests


def check(reported: dict[str, list[int]], ended: Ended, guilty: Seq[str] = (CULPRIT,)) -> None:
    assert set(ended) == set(guilty)
    for name, text in TEXTS.items():
        found = reported.get(name, [])
        assert found == text if name not in guilty else found == text[: len(found)] and len(found) < 30, name


# ---- parts of one text


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("error", [Bang, MemoryError])
@pytest.mark.parametrize("method", ["begin", "observe", "decide", "sync_point"])
def test_a_policy_that_raises_ends_its_own_text(method: str, error: type[Exception], call: int, pool: int) -> None:
    keep, drafter = Recorder(method, call, error), Counting(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN))
    made = with_policy(engine(drafter, chunk=40, pool=pool), keep)
    add(made)
    reported: dict[str, list[int]] = {}
    if method == "begin" and call == 3:  # more calls than there are
        assert not go(made, reported) or pool == 5
        return
    ended = go(made, reported)
    check(reported, ended)
    assert type(ended[CULPRIT]) is error
    assert not keep.open and keep.begun and not drafter.open and drafter.begun == drafter.ended


@pytest.mark.parametrize("pool", [40, 5])
def test_a_policy_that_cannot_end(pool: int) -> None:
    """The text is whole and reported; the preempted requests end."""
    keep, drafter = Recorder("end"), Counting(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN))
    made = with_policy(engine(drafter, pool=pool), keep)
    add(made)
    reported: dict[str, list[int]] = {}
    ended = go(made, reported)
    assert set(ended) == {CULPRIT} and bool(made.preemptions) == (pool == 5)
    assert {name: text for name, text in reported.items() if name != CULPRIT} == {n: t for n, t in TEXTS.items() if n != CULPRIT}
    assert reported.get(CULPRIT, []) == TEXTS[CULPRIT][: len(reported.get(CULPRIT, []))]
    assert not keep.open and not drafter.open


def test_an_abort_hears_nothing_of_it() -> None:
    made = with_policy(engine(), Recorder("end", who="0"))
    add(made, n=2)
    for _ in range(3):
        made.step()
    assert made.abort("0")
    go(made, {})


@pytest.mark.parametrize("method", ["fork", "begin", "decide"])
def test_siblings_end_together(method: str) -> None:
    keep = Recorder(method, 2)
    made = with_policy(engine(RandomTrees(plain.VOCAB, seed=1)), keep)
    add(made, n=3)
    reported: dict[str, list[int]] = {}
    assert set(go(made, reported)) == {CULPRIT}
    assert all(len(reported[name]) == 90 for name in TEXTS if name != CULPRIT)
    assert not keep.open


@pytest.mark.parametrize("place", ["begin", "row", "check"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_sampler_that_raises(place: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`row`: a processor raises in the middle of the step. The request at fault is only known once each runs alone."""
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN))
    add(made)
    calls, right = 0, getattr(made.sampler, place)

    def wrong(*args: Any) -> Any:
        nonlocal calls
        seq = next((arg for arg in args if isinstance(arg, Sequence)), None)
        if seq is not None and seq.request.id == CULPRIT:
            calls += 1
            if calls >= call:
                raise Bang(place)
        return right(*args)

    monkeypatch.setattr(made.sampler, place, wrong)
    reported: dict[str, list[int]] = {}
    ended = go(made, reported)
    check(reported, ended, () if place == "check" or (place == "begin" and call == 2) else (CULPRIT,))


@pytest.mark.parametrize("place", ["_record_prompt", "_event", "_record"])
@pytest.mark.parametrize("call", [1, 4])
def test_a_raise_behind_the_commit(place: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN), chunk=40)
    add(made, prompt_logprobs=1)
    calls, right = 0, getattr(made.outputs, place)

    def wrong(first: Any, *rest: Any) -> Any:
        nonlocal calls
        if (first if place == "_event" else first.seq).request.id == CULPRIT:
            calls += 1
            if calls >= call:
                raise Bang(place)
        return right(first, *rest)

    monkeypatch.setattr(made.outputs, place, wrong)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported))


def test_texts_that_end_in_the_step_of_the_raise_are_reported() -> None:
    """Their reasons are not lost: each text has the length that was requested."""
    keep = Recorder("observe", 6)
    made = with_policy(engine(RandomTrees(plain.VOCAB, seed=4, right=1.0, known=KNOWN)), keep)
    for i in range(COUNT):
        made.add(Request(str(i), PROMPT[i:], SAMPLED.but(max_tokens=4 + 2 * i)))
    reported: dict[str, list[int]] = {}
    go(made, reported)
    assert {name: len(text) for name, text in reported.items() if name != CULPRIT} == {"0": 4, "1": 6, "3": 10}


# ---- no request is known to be at fault


@pytest.mark.parametrize("place", ["forward", "accept", "propose", "commit", "reserve", "move"])
@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("call", [1, 5, 12])
def test_a_fault_that_passes_ends_nobody(place: str, pool: int, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN), chunk=40, pool=pool)
    owner: Any = {"forward": made.runner, "accept": made.verifier, "propose": made.drafter, "move": made.memory.paged.store}.get(
        place, made.memory.paged.table
    )
    calls, right = 0, getattr(owner, place)

    def wrong(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError("just now")
        return right(*args)

    monkeypatch.setattr(owner, place, wrong)
    add(made)
    reported: dict[str, list[int]] = {}
    ended = go(made, reported)
    assert calls >= call
    assert not ended and reported == TEXTS


@pytest.mark.parametrize("pool", [40, 6, 5])
@pytest.mark.parametrize("guilty", [("0",), ("2",), ("1", "3"), ("0", "1", "2", "3")])
def test_whoever_raises_alone_is_guilty(guilty: tuple[str, ...], pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that raises whenever one of them runs, from its eighth token on."""
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN), pool=pool)
    right = made.verifier.accept

    def wrong(work: Any, *rest: Any) -> Any:
        if any(w.seq.request.id in guilty and w.seq.generated > 8 for w in work):
            raise RuntimeError("a kernel of the backend")
        return right(work, *rest)

    monkeypatch.setattr(made.verifier, "accept", wrong)
    add(made)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported), guilty)


@pytest.mark.parametrize("pool", [40, 5])
def test_a_batch_that_raises_where_each_alone_does_not(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(pool=pool)
    right = made.runner.forward

    def wrong(batch: Any, *rest: Any) -> Any:
        if len(batch.roots) > 1:
            raise MemoryError("too many")
        return right(batch, *rest)

    monkeypatch.setattr(made.runner, "forward", wrong)
    add(made)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported), ())


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("pool", [40, 4])
def test_a_scheduler_that_raises_for_more_than_one(pool: int, drafted: bool) -> None:
    """It never preempts, yet a text that steps alone must get pages."""
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN) if drafted else "none", pool=pool)

    class Wrong:
        def __init__(self, right: Any) -> None:
            self.right, self.max_seqs = right, right.max_seqs

        def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Any, least: int = 1) -> Any:
            if len(running) > 1:
                raise Bang("plan")
            return self.right.plan(waiting, running, table)

    made.scheduler = Wrong(made.scheduler)  # type: ignore[assignment]
    add(made)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported), ())
    assert bool(made.preemptions) == (pool == 4)


@pytest.mark.parametrize("guilty", [None, "0", "2", "3"])
@pytest.mark.parametrize("late", [False, True])
def test_a_scheduler_that_raises(guilty: str | None, late: bool) -> None:
    """None: always. late: only with generated tokens."""
    made = engine()

    class Wrong:
        def __init__(self, right: Any) -> None:
            self.right, self.max_seqs = right, right.max_seqs

        def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Any, least: int = 1) -> Any:
            for seq in [*waiting, *running]:
                if guilty in (None, seq.request.id) and (seq.generated or not late):
                    raise Bang("plan")
            return self.right.plan(waiting, running, table)

    made.scheduler = Wrong(made.scheduler)  # type: ignore[assignment]
    add(made)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported), tuple(TEXTS) if guilty is None else (guilty,))


# ---- NaN and infinity


def damaged(value: float, backend: str, where: str = "embed") -> Engine:
    """A model that computes `value` for texts with token 19, or at one id of the head."""
    spec, weights = plain.tiny()
    if where == "embed":
        embed = weights.embed.copy()
        embed[19] = value
        weights = replace(weights, embed=embed)
    else:
        head = weights.head.weight.copy()
        head[7] = value
        weights = replace(weights, head=Linear(head))
    own = registry.backend(backend)("float64")
    runner = Runner(spec, placed(own, weights), own, 40)
    verifier = registry.create("verify", "coupled")
    sampler = Sampler(spec.vocab, frozenset())
    made = registry.create("sched", "sarathi")
    drafter = RandomTrees(plain.VOCAB - 6, seed=4)  # drafts no token 19
    return Engine(runner, made, drafter, verifier, sampler, max_model_len=128)


@pytest.mark.parametrize("backend", ["reference", "torch", "numpy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_no_number_ends_its_own_text(backend: str, value: float, temperature: float) -> None:
    params = SAMPLED.but(temperature=temperature, logit_bias={19: -1e9})
    prompts = [[3, 9, 14], [5, 19, 2], [1, 2, 3, 4], [19]]
    sound = damaged(0.5, backend)
    for i in (0, 2):
        sound.add(Request(str(i), list(prompts[i]), params))
    expected: dict[str, list[int]] = {}
    assert not go(sound, expected)
    made = damaged(value, backend)
    for i, prompt in enumerate(prompts):
        made.add(Request(str(i), list(prompt), params))
    reported: dict[str, list[int]] = {}
    ended = go(made, reported)
    assert set(ended) == {"1", "3"} and all(isinstance(error, NotNumbers) and "\n" not in str(error) for error in ended.values())
    assert reported == expected


@pytest.mark.parametrize("backend", ["reference", "torch", "numpy"])
@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_one_row_of_the_head_is_enough(backend: str, temperature: float, logprobs: int | None) -> None:
    made = damaged(np.nan, backend, "head")
    made.add(Request("0", list(PROMPT[:5]), SAMPLED.but(temperature=temperature, logprobs=logprobs)))
    assert set(go(made, {})) == {"0"}


def test_an_embedding_that_is_no_number() -> None:
    for pool in (Pooling.LAST, Pooling.MEAN):
        made = damaged(np.nan, DEFINITION)
        params = SamplingParams(temperature=0, max_tokens=1, seed=1)
        requests = [Request(str(i), list(prompt), params, wants=Wants(pooling=pool)) for i, prompt in enumerate([[1, 2, 3], [4, 19, 5]])]
        for request in requests:
            made.add(request)
        ended = go(made, {})
        assert set(ended) == {"1"} and isinstance(ended["1"], NotNumbers)
        assert np.isfinite(requests[0].embedding(True)).all()


class Left(Recorder):
    """Notes calls for a text after its fault."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self.raised, self.late = False, list[str]()

    def _met(self, method: str, request: str) -> None:
        if self.raised and request == self.who:
            self.late.append(method)
        self.raised = self.raised or (method, request) == (self.method, self.who)
        super()._met(method, request)


@pytest.mark.parametrize("method", ["begin", "observe", "decide"])
def test_a_text_at_fault_is_left_alone_and_costs_the_others_no_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Left(method)
    made = with_policy(engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=KNOWN), chunk=40), keep)
    monkeypatch.setattr(made, "isolate", lambda *of: pytest.fail(f"the step failed as a whole: {of}"))
    add(made)
    reported: dict[str, list[int]] = {}
    check(reported, go(made, reported))
    assert set(keep.late) <= {"end"}
