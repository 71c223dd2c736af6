"""Workers in actors of a Ray cluster give the texts of one engine, also while actors are killed and start again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray  # noqa: F401, without it these tests do not run

from redraft import LLM, SamplingParams, __version__
from redraft.errors import RedraftError
from redraft.workers.message import Begin, Failed, Stop
from redraft.workers.ray_cluster import RayCluster, connect
from redraft.workers.ray_link import Actor, actors_of
from tests.workers.test_cluster import CONFIG, PLAIN, SPLIT, TWO, Inbox, alone, requests

WRONG = SamplingParams(keep="streaming-llm:sinks=2,recent=40", codec="int4")


@pytest.fixture(scope="module")
def machines() -> Iterator[RayCluster]:
    with connect(at_least=2) as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(config=CONFIG.but(draft="token-recycling"))


def test_actors_that_are_killed_lose_nothing(llm: LLM, machines: RayCluster) -> None:
    """One worker computes prompts and one goes on, so parcels of cached text pass too."""
    expected = alone(llm, requests(llm, 12))
    inbox = Inbox()

    def tokens() -> int:
        return sum(len(found) for found, *_ in inbox.texts.values())

    async def main() -> None:
        _, cluster = actors_of(machines, CONFIG.but(draft="token-recycling"), SPLIT, "round-robin", PLAIN, 600.0)
        await cluster.prepare()
        cluster.start(inbox.deliver, lambda error: None)
        inbox.expect(some := requests(llm, 12))
        await cluster.add(some)
        for member in cluster.members:
            count = tokens()
            await inbox.until(lambda count=count: not inbox.left or tokens() > count + 60)
            assert member.link is not None
            member.link.kill()
        await inbox.until(lambda: not inbox.left)
        async with asyncio.timeout(600):
            while not all(member.ready for member in cluster.members):
                await asyncio.sleep(0.05)
        assert not inbox.errors and inbox.texts == expected
        assert cluster.moved > 0 and [member.starts for member in cluster.members] == [2, 2]
        assert await cluster.check() == [(0, 0), (0, 0)]
        await cluster.stop()
        assert not any(member.link for member in cluster.members)

    asyncio.run(main())


def test_an_actor_that_cannot_begin_is_an_error_of_the_start(machines: RayCluster) -> None:
    async def main() -> None:
        _, cluster = actors_of(machines, CONFIG, TWO, "round-robin", WRONG, 0)
        with pytest.raises(RedraftError, match="streaming-llm"):
            await cluster.prepare()

    asyncio.run(main())


def test_another_version_of_redraft_is_refused() -> None:
    ((failed,),) = Actor(b"", "0.0.1").messages(Begin("0", CONFIG, None, PLAIN))
    assert isinstance(failed, Failed) and str(failed.error) == f"a node of the cluster has Redraft {__version__}, and not 0.0.1"


class Recorder:
    def __init__(self) -> None:
        self.taken: list[Any] = []

    def take(self, message: Any) -> None:
        self.taken.append(message)

    def stop(self) -> None:
        self.taken.append("stop")


def test_messages_are_taken_in_their_order_and_not_before_the_worker_is_there() -> None:
    actor, recorder = Actor(b"", __version__), Recorder()
    for number in (1, 0, 3):
        actor.take(number, number)
    actor._worker = recorder
    actor.take(4, Stop())
    assert recorder.taken == [0, 1]
    actor.take(2, 2)
    assert recorder.taken == [0, 1, 2, 3, "stop"] and actor._sent.get() is None
