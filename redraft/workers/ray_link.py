"""Workers in actors of a Ray cluster, on whatever machines Ray finds room. Messages to a worker are calls of its actor, and those from it a
stream of results. Pages go from worker to worker over TCP, between those that know one secret."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from redraft import __version__, registry
from redraft.config import EngineConfig, SamplingParams
from redraft.errors import RedraftError, Unsupported
from redraft.front import Headless
from redraft.workers.cluster import Cluster
from redraft.workers.message import Begin, Failed, Stop
from redraft.workers.ray_cluster import RayCluster, last_line

log = logging.getLogger("redraft.workers")
THREADS = 2  # of an actor: one gives the stream, the other takes messages
SECRET = 32  # bytes


def actors_of(
    machines: RayCluster,
    config: EngineConfig,
    stages: Mapping[str, tuple[int, ...]],
    router: str,
    check: SamplingParams,
    step_timeout: float,
) -> tuple[Headless, Cluster]:
    """As several.workers_of, with the workers on the nodes of a Ray cluster. InvalidInput if these have no room."""
    config, cpus, gpus = machines.placed(config, len(stages))
    front = Headless(config)
    check = front.cached(check, front.cache_lengths[-1])
    shares = len(set(stages.values())) > 1
    begins = [Begin(name, front.of_worker, None, check, own, shares=shares) for name, own in stages.items()]
    link = partial(RayLink, cpus, gpus, secrets.token_bytes(SECRET))
    return front, Cluster(front, begins, registry.create("route", router).open(), link, step_timeout=step_timeout)


class RayLink:
    """cpus, gpus: of the actor; secret: of all workers."""

    killed = False  # Ray does not say it

    def __init__(self, cpus: int, gpus: int, secret: bytes) -> None:
        self._cpus, self._gpus, self._secret, self._sent = cpus, gpus, secret, 0

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        import ray

        made = ray.remote(Actor).options(num_cpus=self._cpus, num_gpus=self._gpus, max_concurrency=THREADS, max_restarts=0)
        self.actor = made.remote(self._secret, __version__)
        self._receive, self._ended = receive, ended
        self._task = asyncio.create_task(self._run(begin))

    def send(self, message: Any) -> None:
        self.actor.take.options(num_returns=0).remote(self._sent, message)
        self._sent += 1

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)

    async def _run(self, begin: Begin) -> None:
        import ray

        try:
            async for some in self.actor.messages.options(num_returns="streaming").remote(begin):
                for message in await some:
                    self._receive(message)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                log.error("worker %s: its actor cannot begin: %s", begin.name, last_line(error))
        except ray.exceptions.RayError as error:
            log.error("worker %s: %s", begin.name, last_line(error))
        finally:
            self.kill()
            self._ended()


class Actor:
    """The other end of a RayLink. Calls may begin in another order than they were made, so that each has its number."""

    def __init__(self, secret: bytes, version: str) -> None:
        self._secret, self._version = secret, version
        self._sent: queue.SimpleQueue[Any] = queue.SimpleQueue()  # by the worker; None: it has stopped
        self._came: dict[int, Any] = {}  # messages that wait for the worker, or for earlier ones
        self._taken = 0
        self._lock = threading.Lock()
        self._worker: Any = None

    def messages(self, begin: Begin) -> Iterator[list[Any]]:
        """What the worker sends, until it has stopped: as many at a time as there are."""
        try:
            self._begin(begin)
        except RedraftError as error:
            yield [Failed(error)]
            return
        while True:
            some = [self._sent.get()]
            while not self._sent.empty():
                some.append(self._sent.get())
            yield [message for message in some if message is not None]
            if some[-1] is None:
                return

    def take(self, number: int, message: Any) -> None:
        with self._lock:
            self._came[number] = message
        self._take()

    def _take(self) -> None:
        with self._lock:
            while self._worker is not None and self._taken in self._came:
                message = self._came.pop(self._taken)
                self._taken += 1
                if isinstance(message, Stop):
                    self._worker.stop()
                    self._sent.put(None)
                else:
                    self._worker.take(message)

    def _begin(self, begin: Begin) -> None:
        import ray

        if self._version != __version__:
            raise Unsupported(f"a node of the cluster has Redraft {__version__}, and not {self._version}")

        from redraft.kv.remote import PageServer, RemotePages
        from redraft.llm import LLM
        from redraft.workers.worker import Worker

        llm = LLM(config=begin.config)
        llm.engine.policies.check(begin.check)
        source = ""
        if begin.shares:
            source = json.dumps(PageServer(llm.engine.memory, self._secret, ray.util.get_node_ip_address()).address)
        worker = Worker(
            llm,
            self._sent.put,
            lambda: os._exit(1),
            source,
            lambda llm, address: RemotePages(llm.engine.memory, json.loads(address), self._secret),
        )
        worker.start()
        with self._lock:
            self._worker = worker
        self._take()
