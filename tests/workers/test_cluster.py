"""Several worker processes give the texts of one engine, also while workers are killed and start again. No request and no block is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from redraft import LLM, SamplingParams, registry
from redraft.config import EngineConfig
from redraft.core.sequence import Request
from redraft.engine.output import Event
from redraft.errors import InvalidInput, OutOfMemory, RedraftError, Unavailable
from redraft.workers import cluster as module
from redraft.workers.cluster import Cluster
from redraft.workers.link import Process
from redraft.workers.message import Abort, Add, Adopt, Begin, Call, Failed, Parked, Ready, Reply, Stop
from redraft.workers.several import workers_of

PLAIN = SamplingParams()
TWO = {"0": (0,), "1": (0,)}
CONFIG = EngineConfig.of(model="embedded", max_model_len=512, cache_memory=64 << 20)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=120),
    SamplingParams(temperature=1.0, seed=3, max_tokens=120, repetition_penalty=1.1),
    SamplingParams(temperature=0.9, seed=4, max_tokens=200, stop=("\n\n\n", "class "), ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=60, n=3, logprobs=2),
    SamplingParams(temperature=0.8, seed=6, max_tokens=100, keep="streaming-llm:sinks=2,recent=40"),
    SamplingParams(temperature=0.8, seed=7, max_tokens=80, structured_outputs={"json": {"type": "array", "items": {"type": "integer"}}}),
    SamplingParams(temperature=0.8, seed=8, max_tokens=60, prompt_logprobs=1),
]
PROMPTS = ["def add(a, b):\n" * 8, "class Stack:\n    ", "import os\n\n\ndef main(", "# numbers\n"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(config=CONFIG.but(draft="token-recycling"))


def requests(llm: LLM, count: int) -> list[Request]:
    def one(i: int) -> Request:
        return Request(f"r{i}", llm.tokenizer.encode(PROMPTS[i % len(PROMPTS)]), PARAMS[i % len(PARAMS)])

    return [one(i) for i in range(count)]


Texts = dict[tuple[str, int], tuple[list[int], str, int]]  # request and text -> tokens, text, log-probabilities


class Inbox:
    """All events of a host."""

    def __init__(self) -> None:
        self.texts: Texts = {}
        self.errors: dict[str, Exception] = {}
        self.left = 0
        self.news = asyncio.Event()

    def expect(self, requests: list[Request]) -> None:
        self.left += sum(request.params.n for request in requests)

    def deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.error is not None:
                self.errors[event.request.id] = event.error
                self.left -= event.request.params.n
                continue
            tokens, text, count = self.texts.get((event.request.id, event.index), ([], "", 0))
            self.texts[event.request.id, event.index] = [*tokens, *event.tokens], text + event.text, count + len(event.logprobs)
            self.left -= event.reason is not None
        self.news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(600):
            while not done():
                self.news.clear()
                await self.news.wait()


def alone(llm: LLM, some: list[Request]) -> Texts:
    inbox = Inbox()
    for request in some:
        llm.engine.add(request)
    while llm.engine.has_work:
        inbox.deliver(llm.engine.step())
    return inbox.texts


@pytest.fixture(scope="module")
def wanted(llm: LLM) -> Callable[[int], Texts]:
    """The texts of the first requests, from one engine."""
    found = alone(llm, requests(llm, 21))
    return lambda count: {key: text for key, text in found.items() if int(key[0][1:]) < count}


@asynccontextmanager
async def running(
    stages: dict[str, tuple[int, ...]] = TWO, router: str = "round-robin", config: EngineConfig = CONFIG
) -> AsyncIterator[tuple[Cluster, Inbox]]:
    _, cluster = workers_of(config.but(draft="token-recycling"), stages, router, PLAIN, 600.0)
    inbox = Inbox()
    await cluster.prepare()
    cluster.start(inbox.deliver, lambda error: None)
    try:
        yield cluster, inbox
    finally:
        await cluster.stop()


def processes(cluster: Cluster) -> list[Any]:
    return [cast(Process, member.link).process for member in cluster.members if member.link is not None]


SPLIT = {"prefill-0": (0,), "decode-0": (1,)}


@pytest.mark.parametrize("stages", [TWO, SPLIT], ids=["replicas", "split"])
def test_workers_that_are_killed_and_restarted_lose_nothing(
    llm: LLM, wanted: Callable[[int], Texts], stages: dict[str, tuple[int, ...]]
) -> None:
    expected = wanted(21)

    async def main() -> None:
        async with running(stages) as (cluster, inbox):
            inbox.expect(some := requests(llm, 21))
            await cluster.add(some)
            for victim in (0, 1, 0):
                count = len(inbox.texts) + sum(len(tokens) for tokens, *_ in inbox.texts.values())
                await inbox.until(
                    lambda count=count: not inbox.left or sum(len(tokens) for tokens, *_ in inbox.texts.values()) > count + 100
                )
                process = processes(cluster)[victim % len(processes(cluster))]
                os.kill(process.pid, signal.SIGKILL)
                await asyncio.to_thread(process.wait)
            restart = asyncio.create_task(cluster.restart())
            await inbox.until(lambda: not inbox.left)
            await restart
            async with asyncio.timeout(600):
                while not all(member.ready for member in cluster.members):
                    await asyncio.sleep(0.05)
            assert not inbox.errors and inbox.texts == expected
            assert cluster.moved > 0 and all(member.starts > 1 for member in cluster.members)
            assert all(request.prompt_logprobs for request in some if request.params.prompt_logprobs is not None)
            assert await cluster.check() == [(0, 0), (0, 0)]
            assert not cluster._tickets and not any(m.tickets or m.replies or m.parked for m in cluster.members)
        assert not processes(cluster)

    asyncio.run(main())


def test_signals_to_all_processes_are_for_the_front(llm: LLM, wanted: Callable[[int], Texts]) -> None:
    expected = wanted(7)

    async def main() -> None:
        async with running() as (cluster, inbox):
            inbox.expect(some := requests(llm, 7))
            await cluster.add(some)
            await inbox.until(lambda: bool(inbox.texts))
            for process in processes(cluster):
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
            await inbox.until(lambda: not inbox.left)
            assert not inbox.errors and inbox.texts == expected
            assert cluster.moved == 0 and all(member.starts == 1 for member in cluster.members)
        assert not processes(cluster)

    asyncio.run(main())


def test_prompts_are_read_by_one_worker_and_texts_go_on_in_the_other(llm: LLM, wanted: Callable[[int], Texts]) -> None:
    expected = wanted(14)

    async def main() -> None:
        async with running(SPLIT, "splitwise") as (cluster, inbox):
            for router in ("splitwise", "splitwise", "least-load"):  # after the first time the receiver has most pages
                cluster.router = registry.create("route", router).open()
                inbox.texts.clear()
                inbox.expect(some := requests(llm, 14))
                await cluster.add(some)
                await inbox.until(lambda: not inbox.left)
                assert not inbox.errors and inbox.texts == expected
            assert await cluster.check() == [(0, 0), (0, 0)] and not cluster.moved
            decode = cluster.members[1]
            await until(lambda: decode.figures.copied > 0 and decode.figures.found > 0)
            assert not decode.figures.lost

    asyncio.run(main())


def test_a_request_that_a_worker_refuses_leaves_nothing(llm: LLM) -> None:
    good = Request("good", llm.tokenizer.encode("def f("), SamplingParams(max_tokens=300))
    bad = Request("bad", [1, 2], SamplingParams(max_tokens=5, keep="streaming-llm:sinks=2,recent=40", codec="int4"))

    async def main() -> None:
        async with running() as (cluster, _):
            with pytest.raises(RedraftError) as found:
                await cluster.add([good, bad])
            with pytest.raises(InvalidInput, match="not a token id"):
                await cluster.add([Request("x", [1 << 20], PLAIN)])
            with pytest.raises(type(found.value)) as here:
                llm.engine.add(bad)
            assert str(here.value) == str(found.value)
            async with asyncio.timeout(600):
                while await cluster.check() != [(0, 0), (0, 0)]:
                    await asyncio.sleep(0.02)
            assert not cluster._tickets

    asyncio.run(main())


def test_a_router_that_splits_needs_workers_that_split() -> None:
    with pytest.raises(InvalidInput, match="needs --instances"):
        workers_of(CONFIG, TWO, "splitwise", PLAIN, 0)


def test_a_worker_that_cannot_begin_is_an_error_of_the_start() -> None:
    wrong = SamplingParams(keep="streaming-llm:sinks=2,recent=40", codec="int4")

    async def main() -> None:
        _, cluster = workers_of(CONFIG, TWO, "round-robin", wrong, 0)
        with pytest.raises(RedraftError, match="streaming-llm"):
            await cluster.prepare()
        assert not processes(cluster)

    asyncio.run(main())


class Doomed:
    """A worker that dies when it gets a request."""

    killed = False

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        self.ended, self.gone = ended, False
        asyncio.get_running_loop().call_soon(receive, Ready(module.IDLE))

    def send(self, message: Any) -> None:
        if isinstance(message, Add | Stop):
            self.kill()

    def kill(self) -> None:
        if not self.gone:
            self.gone = True
            asyncio.get_running_loop().call_soon(self.ended)


def test_a_request_that_ends_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)

    async def main() -> None:
        _, cluster = workers_of(CONFIG, TWO, "round-robin", PLAIN, 0)
        monkeypatch.setattr(cluster, "_link", Doomed)
        await cluster.prepare()
        async with asyncio.timeout(600):
            with pytest.raises(Unavailable, match="5 workers ended while they computed this request"):
                await cluster.add([Request("r", [1, 2, 3], PLAIN)])
        assert not cluster._tickets and sum(member.starts for member in cluster.members) >= 5

    asyncio.run(main())


def test_workers_that_are_ended_from_outside_are_no_fault_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(Doomed, "killed", True)

    async def main() -> None:
        _, cluster = workers_of(CONFIG, TWO, "round-robin", PLAIN, 0)
        monkeypatch.setattr(cluster, "_link", Doomed)
        await cluster.prepare()
        task = asyncio.create_task(cluster.add([Request("r", [1, 2, 3], PLAIN)]))
        async with asyncio.timeout(600):
            while sum(member.starts for member in cluster.members) < 12:
                await asyncio.sleep(0.01)
        assert not task.done() and len(cluster._tickets) == 1
        cluster.abort("r")
        await asyncio.gather(task, return_exceptions=True)
        await cluster.stop()

    asyncio.run(main())


class Absent(Doomed):
    """A worker that cannot begin."""

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        super().start(begin, lambda _: receive(Failed(OutOfMemory("no room"))), ended)
        asyncio.get_running_loop().call_soon(self.kill)


def test_the_error_of_a_worker_is_that_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        _, cluster = workers_of(CONFIG, TWO, "round-robin", PLAIN, 0)
        monkeypatch.setattr(cluster, "_link", Absent)
        with pytest.raises(OutOfMemory, match="no room"):
            await cluster.prepare()

    asyncio.run(main())


class Tame:
    """A worker that is ready when the test says so, and keeps what it is sent."""

    made: list[Tame]
    killed = False

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        self.begin, self.receive, self.ended, self.sent = begin, receive, ended, list[Any]()
        self.made.append(self)

    def send(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, Call):
            asyncio.get_running_loop().call_soon(self.receive, Reply(message.number))
        if isinstance(message, Stop):
            self.kill()

    def kill(self) -> None:
        asyncio.get_running_loop().call_soon(self.ended)

    def ready(self) -> None:
        self.receive(Ready(module.IDLE))

    @property
    def adapters(self) -> list[str]:
        """Those that it has: from the start, and loaded later."""
        found = list(self.begin.config.model.adapters)
        for call in self.sent:
            if isinstance(call, Call):
                found = [*found, call.arguments[0]] if call.name == "load_lora" else [n for n in found if n != call.arguments[0]]
        return found


@asynccontextmanager
async def tame(monkeypatch: pytest.MonkeyPatch, stages: dict[str, tuple[int, ...]] = TWO) -> AsyncIterator[tuple[Cluster, list[Tame]]]:
    """A cluster and all lives of its two workers."""
    _, cluster = workers_of(CONFIG, stages, "round-robin", PLAIN, 0)
    monkeypatch.setattr(Tame, "made", [], raising=False)
    monkeypatch.setattr(cluster, "_link", Tame)
    preparing = asyncio.create_task(cluster.prepare())
    for count in (1, 2):
        await until(lambda count=count: len(Tame.made) == count)
        Tame.made[-1].ready()
    await preparing
    cluster.start(lambda events: None, lambda error: None)
    yield cluster, Tame.made
    await cluster.stop()


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not done():
            await asyncio.sleep(0.001)


def test_a_worker_that_starts_while_an_adapter_is_loaded_has_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with tame(monkeypatch) as (cluster, lives):
            lives[0].kill()
            await until(lambda: len(lives) == 3)  # it begins
            await cluster.load_lora("x", Path("folder"))
            assert lives[1].adapters == ["x"] and cluster.front.loras == ["x"]
            lives[2].ready()
            await until(lambda: len(lives) == 4)
            lives[3].ready()
            assert lives[3].adapters == ["x"] and all(member.ready for member in cluster.members)
            with pytest.raises(InvalidInput, match="unload it first"):
                await cluster.load_lora("x", Path("folder"))

    asyncio.run(main())


def test_a_worker_that_ends_while_an_adapter_is_loaded_starts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with tame(monkeypatch) as (cluster, lives):
            lives[0].send = lambda message: lives[0].kill()  # type: ignore[method-assign]
            await cluster.load_lora("x", Path("folder"))
            await until(lambda: len(lives) == 3)
            lives[2].ready()
            assert lives[1].adapters == lives[2].adapters == ["x"] and cluster.front.loras == ["x"]

    asyncio.run(main())


def test_an_adapter_that_a_worker_refuses_is_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with tame(monkeypatch) as (cluster, lives):
            sent = lives[0].send

            def send(message: Any) -> None:
                sent(message)
                if message.name == "load_lora":
                    lives[0].receive(Reply(message.number, None, OutOfMemory("no room")))

            lives[0].send = send  # type: ignore[method-assign]
            with pytest.raises(OutOfMemory, match="no room"):
                await cluster.load_lora("x", Path("folder"))
            assert lives[1].adapters == [] and cluster.front.loras == [] and not cluster.members[0].begin.config.model.adapters
            lives[0].send = sent  # type: ignore[method-assign]
            await cluster.load_lora("x", Path("folder"))

    asyncio.run(main())


def test_an_adapter_stays_until_its_requests_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with tame(monkeypatch) as (cluster, lives):
            await cluster.load_lora("x", Path("folder"))
            adding = asyncio.create_task(cluster.add([Request("r", [1, 2], SamplingParams(lora="x"))]))
            await asyncio.sleep(0)
            unloading = asyncio.create_task(cluster.unload_lora("x"))
            await asyncio.sleep(0.05)
            assert lives[0].adapters == lives[1].adapters == ["x"] and cluster.front.loras == []
            cluster.abort("r")
            await unloading
            assert lives[0].adapters == lives[1].adapters == []
            with pytest.raises(Unavailable):
                await adding

    asyncio.run(main())


def test_requests_that_are_queued_leave_room_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with tame(monkeypatch) as (cluster, _):
            whole, request = cluster.free, Request("r", [1, 2], SamplingParams(n=3))
            adding = asyncio.create_task(cluster.add([request]))
            await asyncio.sleep(0)
            assert cluster.free == whole == 2 * cluster.front.scheduler.max_seqs
            request.admitted = 1.0
            assert cluster.free == whole - 3
            cluster.abort("r")
            with pytest.raises(Unavailable, match="ended before"):
                await adding

    asyncio.run(main())


def test_workers_that_wait_for_each_others_memory_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADOPTED", 0.0)
    monkeypatch.setattr(module, "TICK", 0.01)

    async def main() -> None:
        async with tame(monkeypatch, SPLIT) as (cluster, (first, second)):
            task = asyncio.create_task(cluster.add([Request("r", [1, 2, 3], PLAIN)]))
            await until(lambda: any(isinstance(message, Add) for message in first.sent))
            first.receive(Parked("r#1", {}))
            await until(lambda: any(isinstance(message, Adopt) for message in second.sent))
            await asyncio.sleep(0.1)  # some looks at the workers
            assert Abort("r#1") not in first.sent  # the second worker has memory for it as soon as its texts end
            cluster.members[1].parked["other#1"] = cluster._tickets["r"]
            await until(lambda: Abort("r#1") in first.sent)
            assert cluster._tickets["r"].left is None and cluster._tickets["r"].worker is cluster.members[1]
            cluster.members[1].parked.clear()
            cluster.abort("r")
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
