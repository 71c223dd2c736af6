"""A request that changes engines with its pages: the same texts as in one engine, events that go on, and no page left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams, registry
from redraft.core.sequence import Pooling, Request, Space, Wants
from redraft.engine.engine import Engine
from redraft.engine.output import Event, Progress, Stats
from redraft.engine.parcel import Parcel
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.remote import PageServer, RemotePages
from redraft.kv.shared import SharedMemory, SharedPages
from redraft.models.trained import Trained, model_hash
from tests.contracts import identity
from tests.engine.test_resume import Received
from tests.kv.reuse.test_pie import OLD, edited
from tests.kv.reuse.test_pie import request as reuse_request
from tests.kv.reuse.test_pie import run as reuse_run

PROMPT = "def add(a, b):\n    return a + b\n\n\n" * 4 + "def mul(a, b):\n    return"
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}


@pytest.fixture(scope="module")
def llms() -> tuple[LLM, LLM]:
    here, there = (LLM("embedded", draft="token-recycling", max_model_len=256, cache_memory="8MB") for _ in range(2))
    return here, there


class Pair:
    """The engine where requests begin and the one where they go on."""

    def __init__(self, llms: tuple[LLM, LLM]) -> None:
        self.first, self.second = (llm.engine for llm in llms)
        self.prompt = llms[0].tokenizer.encode(PROMPT)
        for engine in (self.first, self.second):
            engine.table.forget()
        self.before = self.second.arrivals.copied, self.second.arrivals.found, self.second.arrivals.lost

    def request(self, name: str, params: SamplingParams, **fields: Any) -> Request:
        return Request(name, list(self.prompt), params, **fields)

    def begin(self, request: Request, received: Received, progress: list[Progress] | None = None) -> Parcel | None:
        """Runs a request until it may leave; None if it ended."""
        self.first.add(request, progress or (), parks=True)
        while self.first.has_work:
            received.take(self.first.step())
            self.first.memory.check()
        ready = self.first.ready()
        assert ready in ([], [request.id]) and self.first.ready() == []
        return sent(self.first.release(request.id)) if ready else None

    def run(self, request: Request, source: Any = None) -> Received:
        received = Received(request.params.n)
        parcel = self.begin(request, received)
        if parcel is not None:
            assert [len(one.tokens) for one in parcel.progress] == [len(tokens) for tokens in received.tokens]
            self.second.adopt(parcel, source or self.first.memory)
            finish(self.second, received)
            assert self.second.settled() == [request.id]
            self.first.forget(request.id)
        self.clean()
        return received

    def clean(self) -> None:
        for engine in (self.first, self.second):
            engine.memory.check()
            assert engine.memory.used() == 0 and not len(engine.outputs) and not engine.has_work

    @property
    def figures(self) -> tuple[int, ...]:
        """Tokens copied, tokens found, texts lost, in this test."""
        now = self.second.arrivals.copied, self.second.arrivals.found, self.second.arrivals.lost
        return tuple(a - b for a, b in zip(now, self.before, strict=True))


def sent(parcel: Parcel) -> Parcel:
    """As it arrives in another process."""
    return Parcel.of(parcel.request, json.loads(json.dumps(parcel.numbers())))


def finish(engine: Engine, received: Received) -> None:
    while engine.has_work:
        received.take(engine.step())
        engine.memory.check()


@pytest.fixture
def pair(llms: tuple[LLM, LLM]) -> Iterator[Pair]:
    yield Pair(llms)
    for llm in llms:
        llm.engine.ready(), llm.engine.settled()


CASES = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "sampled": SamplingParams(temperature=1.0, seed=3, max_tokens=40, repetition_penalty=1.2),
    "mirostat": SamplingParams(temperature=1.5, seed=3, max_tokens=40, mirostat=2, mirostat_tau=2, mirostat_eta=0.5, n=2),
    "no drafts": SamplingParams(temperature=1.0, seed=3, max_tokens=40, draft="none"),
    "stop": SamplingParams(temperature=0.8, seed=4, max_tokens=60, stop=("\n\n", "  return")),
    "n": SamplingParams(temperature=1.0, seed=5, max_tokens=24, n=3, logprobs=2, provenance=True),
    "prompt logprobs": SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=1),
    "structured": SamplingParams(temperature=1.0, seed=2, max_tokens=40, structured_outputs={"json": LIST}),
    "eviction": SamplingParams(temperature=0.7, seed=6, max_tokens=60, keep="streaming-llm:sinks=2,recent=30"),
    "int8": SamplingParams(temperature=0.7, seed=6, max_tokens=60, codec="int8"),
    "int4": SamplingParams(temperature=0.7, seed=6, max_tokens=60, codec="int4:block=32"),
    "sparse": SamplingParams(temperature=0.7, seed=6, max_tokens=60, read="page-top-k:tokens=64,sinks=0"),
    "sentences": SamplingParams(temperature=0.7, seed=6, max_tokens=60, read="sentencekv:tokens=48,start=2,recent=4,longest=8"),
    "blocks": SamplingParams(temperature=0.7, seed=6, max_tokens=60, read="infllm:tokens=50,local=16,sinks=2,block=32"),
    "both": SamplingParams(temperature=0.7, seed=6, max_tokens=60, codec="int4:block=32", read="page-top-k:tokens=64,sinks=0"),
    "depth": SamplingParams(temperature=0.7, seed=6, max_tokens=60, depth="layer-skip:speedup=2"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_request_that_changes_engines_has_the_same_texts(llms: tuple[LLM, LLM], pair: Pair, case: str) -> None:
    params = CASES[case].but(seed=CASES[case].seed or 0)
    whole, parts = Received(params.n), pair.run(pair.request("r", params))
    llms[0].engine.add(request := pair.request("whole", params))
    finish(llms[0].engine, whole)
    assert parts.tokens == whole.tokens and parts.text == whole.text and all(parts.ended)
    assert [[entry.token for entry in some] for some in parts.logprobs] == [[entry.token for entry in some] for some in whole.logprobs]
    computed = case in ("eviction", "blocks")  # with a state of its own
    assert (len(whole.tokens[0]) > 1 and pair.figures[0] > 0) or computed
    assert pair.figures[0] == 0 or not computed
    assert pair.figures[2] == 0 and len(request.prompt_logprobs) == (len(pair.prompt) if case == "prompt logprobs" else 0)


def test_a_prompt_of_vectors_and_a_steered_text_change_engines(llms: tuple[LLM, LLM], pair: Pair, tmp_path: Path) -> None:
    hidden = llms[0].spec.hidden
    u = np.random.default_rng(1).standard_normal(hidden).astype(np.float32)
    about = {"layer": 1, "context": 300.0, "prior": -300.0}
    file = Trained("context-knob", model_hash(llms[0].runner), about, {"u": u}).save(tmp_path / "knob")
    vectors = np.random.default_rng(2).standard_normal((len(pair.prompt), hidden)).astype(np.float32)
    params = SamplingParams(temperature=0.7, seed=6, max_tokens=30)
    found = set()
    for steer in (None, f"context-knob:path={file}"):
        for given in (None, vectors):
            whole, request = Received(1), pair.request("r", params.but(steer=steer), vectors=given, salt="tenant")
            parts = pair.run(request)
            llms[0].engine.add(pair.request("whole", params.but(steer=steer), vectors=given, salt="tenant"))
            finish(llms[0].engine, whole)
            assert parts.tokens == whole.tokens
            found.add(tuple(whole.tokens[0]))
    assert len(found) == 4
    assert pair.figures[0] > 0 and pair.figures[2] == 0


def test_pages_that_are_there_are_not_copied(pair: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    assert len(pair.prompt) > 32
    pair.run(pair.request("a", params))
    assert pair.figures == (len(pair.prompt), 0, 0)
    second = pair.request("b", params)
    pair.run(second)
    found = len(pair.prompt) // 32 * 32
    assert pair.figures == (2 * len(pair.prompt) - found, found, 0)
    assert second.cached_tokens == found  # where it began
    other = pair.request("c", params, salt="another tenant")
    pair.run(other)
    assert pair.figures[1] == found and other.cached_tokens == 0


def test_texts_of_a_request_share_the_pages_of_its_prompt(pair: Pair) -> None:
    received = pair.run(pair.request("r", SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=6)))
    assert all(received.ended) and pair.figures[1] >= 3 * (len(pair.prompt) // 32 * 32)


class Broken:
    """A source that fails as its test says."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault, self.calls = engine, fault, 0

    def read(self, space: Space, pages: np.ndarray) -> Any:
        self.calls += 1
        if self.fault == "gone":
            raise ConnectionResetError("the other side ended")
        if self.fault == "foreign":
            return self.engine.memory.read(space, (pages + 1) % self.engine.memory.blocks)
        return {name: array[:-1] for name, array in self.engine.memory.read(space, pages).items()}


@pytest.mark.parametrize("case", ["sampled", "n", "int4", "depth"])
@pytest.mark.parametrize("fault", ["gone", "foreign", "short"])
def test_what_does_not_arrive_is_computed_again(pair: Pair, case: str, fault: str) -> None:
    params = CASES[case]
    want = pair.run(pair.request("whole", params))
    pair.second.table.forget()
    source, figures = Broken(pair.first, fault), pair.figures
    found = pair.run(pair.request("r", params), source)
    assert found.tokens == want.tokens and found.text == want.text and source.calls
    assert pair.figures[2] - figures[2] == source.calls


def test_other_texts_do_not_notice_a_copy_that_fails(pair: Pair) -> None:
    params = CASES["sampled"]
    want = pair.run(pair.request("whole", params)).tokens
    received = {name: Received(1) for name in ("lost", "beside")}
    parcel = pair.begin(pair.request("lost", params), received["lost"])
    assert parcel is not None
    pair.second.add(pair.request("beside", params))
    received["beside"].take(pair.second.step())
    pair.second.adopt(parcel, Broken(pair.first, "gone"))
    while pair.second.has_work:
        for event in pair.second.step():
            received[event.request.id].take([event])
    assert received["lost"].tokens == want == received["beside"].tokens
    pair.first.forget("lost")
    pair.clean()


@pytest.mark.parametrize(
    ("params", "wants"),
    [(SamplingParams(max_tokens=1, seed=1), Wants()), (SamplingParams(max_tokens=4, seed=1), Wants(pooling=Pooling.MEAN))],
)
def test_a_request_that_ends_at_once_does_not_leave(pair: Pair, params: SamplingParams, wants: Wants) -> None:
    received = Received(1)
    assert pair.begin(pair.request("r", params, wants=wants), received) is None and all(received.ended)
    pair.clean()


def test_one_of_several_texts_may_end_before_the_others_leave(pair: Pair) -> None:
    params = SamplingParams(temperature=3.0, seed=5, n=3, max_tokens=12)
    whole = pair.run(pair.request("whole", params))
    stop = whole.tokens[1][0]
    assert stop not in whole.tokens[0] + whole.tokens[2]
    received = pair.run(pair.request("r", params.but(stop_token_ids=(stop,))))
    assert received.tokens == [whole.tokens[0], [stop], whole.tokens[2]] and all(received.ended)


def test_reused_pages_travel_and_are_nobody_elses() -> None:
    """A text with pages of another text, moved to other positions, has them in the next engine too, and does not publish them."""
    first, second, alone = (identity.engine(max_model_len=160, pool=24) for _ in range(3))
    edit, old = edited(40, 3, 9), {"before": OLD, "reuse": "pie:shortest=4"}
    reuse_run(alone, reuse_request("old", OLD))
    want = reuse_run(alone, reuse_request("new", edit, **old))
    reuse_run(first, reuse_request("old", OLD))
    received, moved = Received(1), reuse_request("new", edit, **old)
    first.add(moved, parks=True)
    finish(first, received)
    assert moved.reused_tokens > 30
    second.adopt(sent(first.release("new")), first.memory)
    finish(second, received)
    first.forget("new")
    assert received.tokens[0] == want and second.arrivals.lost == 0
    plainly = reuse_request("again", edit)
    assert reuse_run(second, plainly) == reuse_run(identity.engine(max_model_len=160, sharing=False), reuse_request("plain", edit))
    assert plainly.cached_tokens == 32  # the page before the edit


@pytest.mark.torch
def test_a_model_with_a_state_takes_it_along() -> None:
    from tests.contracts import test_hybrid

    engines = [test_hybrid.engine(none) for _ in range(3)]
    params, prompt = SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=2), list(identity.prompts()[0])
    want, received = Received(2), Received(2)
    engines[0].add(Request("alone", prompt, params))
    finish(engines[0], want)
    engines[1].add(Request("r", prompt, params), parks=True)
    finish(engines[1], received)
    engines[2].adopt(sent(engines[1].release("r")), engines[1].memory)
    finish(engines[2], received)
    assert received.tokens == want.tokens and engines[2].arrivals.lost == 0 and engines[2].arrivals.copied > 0
    engines[1].forget("r")
    assert engines[1].memory.used() == engines[2].memory.used() == 0


def none(runner: Any, sampler: Any) -> Any:
    return registry.create("draft", "none").open(runner, sampler)


@pytest.mark.parametrize("kind", ["shared", "remote"])
def test_pages_come_from_another_process_s_memory(llms: tuple[LLM, LLM], kind: str) -> None:
    """The same as in one process, through the sources that processes use."""
    if llms[0].runner.backend.name not in ("numpy", "native") or (kind == "shared" and not hasattr(os, "memfd_create")):
        pytest.skip("this backend or system shares no memory")
    shared = SharedMemory() if kind == "shared" else None
    first = LLM("embedded", max_model_len=256, cache_memory="8MB", room=None if shared is None else shared.room)
    pair = Pair((first, llms[1]))
    server = PageServer(pair.first.memory, b"the secret of a test")
    source = (
        RemotePages(pair.second.memory, server.address, b"the secret of a test")
        if shared is None
        else SharedPages(pair.second.memory, shared.path)
    )
    for case in ("sampled", "n", "int4", "both"):
        want, params = Received(CASES[case].n), CASES[case].but(draft="none")
        pair.first.add(pair.request("whole", params), parks=False)
        finish(pair.first, want)
        pair.first.table.forget()
        assert pair.run(pair.request(case, params), source).tokens == want.tokens
    assert pair.figures[0] > 200 and pair.figures[2] == 0
    source.close()
    server.close()


def test_a_parked_request_is_no_work_and_can_be_aborted(pair: Pair) -> None:
    for release in (False, True):
        parcel = pair.begin(pair.request("r", CASES["n"]), Received(3))
        assert parcel is not None and not pair.first.has_work and pair.first.memory.used() > 0
        if release:
            pair.second.adopt(parcel, pair.first.memory)
            assert pair.second.abort("r") and pair.second.settled() == ["r"]
        assert pair.first.abort("r") and not pair.first.abort("r")
        pair.clean()
    with pytest.raises(InvalidInput, match=r"^request 'r': not parked; only a request that ready"):
        pair.first.release("r")


def test_a_parcel_can_be_given_to_another_engine_after_the_first_died(pair: Pair) -> None:
    want = pair.run(pair.request("whole", CASES["sampled"]))
    received = Received(1)
    assert pair.begin(pair.request("r", CASES["sampled"]), received) is not None
    pair.second.adopt(sent(pair.first.release("r")), pair.first.memory)
    received.take(pair.second.step())
    pair.second.abort("r")  # its events are lost with it from here on
    again = Received(1)
    again.take([event_of(pair.request("r", CASES["sampled"]), pair.first.release("r").progress[0])])
    pair.second.adopt(sent(pair.first.release("r")), pair.first.memory)
    finish(pair.second, again)
    assert again.tokens == want.tokens
    pair.first.forget("r")
    pair.second.settled()
    pair.clean()


def event_of(request: Request, progress: Progress) -> Event:
    return Event(request, 0, progress.tokens, "", [], [], None, Stats())


def test_a_request_with_tokens_leaves_after_one_more(pair: Pair) -> None:
    """As after the death of the engine where it went on."""
    params = CASES["sampled"]
    want = pair.run(pair.request("whole", params))
    received = Received(1)
    received.tokens[0] = want.tokens[0][:7]
    parcel = pair.begin(pair.request("r", params), received, received.progress)
    assert parcel is not None and len(parcel.progress[0].tokens) == 8
    pair.second.adopt(parcel, pair.first.memory)
    finish(pair.second, received)
    assert received.tokens == want.tokens
    pair.first.abort("r")


def test_parked_pages_make_new_requests_wait(llms: tuple[LLM, LLM]) -> None:
    """An engine from which nothing is taken over admits no more than it can hold, and goes on when pages are freed."""
    small = LLM("embedded", max_model_len=128, cache_memory=5 * llms[0].runner.memory.paged.store.block_bytes)
    engine, prompt = small.engine, llms[0].tokenizer.encode(PROMPT * 2)[:70]
    for i in range(6):
        engine.add(Request(str(i), [*prompt, 99 + i], SamplingParams(max_tokens=9, seed=1, n=2), salt=str(i)), parks=True)
    for i in range(6):
        while not (ready := engine.ready()):
            engine.step()
            engine.memory.check()
        assert ready == [str(i)] and engine.memory.used() >= 3
        for _ in range(3):
            assert engine.step() == [] and not engine.running and len(engine.waiting) == 5 - i
        assert not engine.has_work  # a thread that steps it may sleep
        engine.forget(engine.release(ready[0]).request.id)
    assert engine.memory.used() == 0 and not engine.has_work


def test_a_parcel_of_another_model_is_refused(pair: Pair) -> None:
    parcel = pair.begin(pair.request("r", CASES["greedy"].but(seed=1)), Received(1))
    assert parcel is not None
    other = LLM("embedded", quant="int8", max_model_len=256)
    with pytest.raises(Unsupported, match=r"^request r: its pages come from an engine with another quantization$"):
        other.engine.adopt(parcel, pair.first.memory)
    with pytest.raises(Unsupported, match=r"^request r: its pages come from an engine with another weights$"):
        pair.second.adopt(parcel._replace(form={**parcel.form, "weights": "others"}), pair.first.memory)
    assert not pair.second.has_work and not other.engine.has_work
    pair.first.forget("r")
    pair.clean()
