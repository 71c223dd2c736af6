"""The host with many workers: it routes requests to them, and brings a request whose worker is gone to another one.

The front keeps of each request the tokens that it received. A request that changes its worker goes on from these. Noise is a function of
seed and position, so its texts are the same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from redraft.core.sequence import Request
from redraft.engine.output import Event, Progress, Stats
from redraft.errors import InvalidInput, RedraftError, Unavailable, shown
from redraft.front import Headless
from redraft.ops.format import PAGE
from redraft.sched.router import Load, OpenRouter
from redraft.workers.host import Figures
from redraft.workers.link import Link
from redraft.workers.message import (
    Abort,
    Add,
    Adopt,
    Begin,
    Call,
    Failed,
    Job,
    Parked,
    Piece,
    Pieces,
    Ready,
    Reply,
    Settled,
    State,
    Stop,
)  # fmt: skip

log = logging.getLogger("redraft.workers")
DEATHS = 5  # workers that may die by themselves, one after the other, with a request that gets no token from any of them
STEADY = 10.0  # seconds that a worker lives if its end is no fault of its start
LONGEST_PAUSE = 30.0  # seconds before a worker that ended starts again
QUIET = 2.0  # seconds without a message after which a worker counts as busy
TICK = 0.5
ADOPTED = 10.0  # seconds that a request keeps its pages at one worker while another one, which has parked requests too, has no room
SOON = 0.02  # seconds between two looks at what should end soon
IDLE = Figures()
LAST = 1  # the stage after the prompt, where requests are split
STOPPING = 10.0  # seconds in which a worker may end by itself


class Left(NamedTuple):
    """A request that a worker has parked until another one has its pages. key: its name there; parcel: see message.Parked."""

    member: Member
    key: str
    parcel: dict[str, Any]


@dataclass(eq=False)
class Ticket:
    """A request under way. attempt: how often it was sent to a worker; added: set when a worker has it; deaths: workers that died with it
    since its last token; left: the worker that has it parked; last: the worker of its last stage, if that is chosen; beyond: whether it
    got tokens since it was parked."""

    request: Request
    added: asyncio.Future[None]
    tokens: list[list[int]]
    stats: list[Stats]
    ended: list[bool]
    worker: Member | None = None
    attempt: int = 0
    sent: float = 0.0
    deaths: int = 0
    left: Left | None = None
    last: Member | None = None
    beyond: bool = False

    @property
    def key(self) -> str:
        return f"{self.request.id}#{self.attempt}"

    @property
    def began(self) -> bool:
        return any(self.tokens)

    @property
    def progress(self) -> tuple[Progress, ...]:
        """Of each text; empty if none has a token."""
        if not self.began:
            return ()
        return tuple(Progress(list(t), s, e) for t, s, e in zip(self.tokens, self.stats, self.ended, strict=True))


@dataclass(eq=False)
class Member:
    """A worker as the front sees it, over all its lives."""

    begin: Begin
    link: Link | None = None  # None: it is not there
    ready: bool = False
    leaving: bool = False
    hangs: bool = False  # its step did not end, so that it was killed
    outdated: bool = False  # it began before its `begin` changed
    starts: int = 0
    quick: int = 0  # ends soon after a start, one after the other
    began: float = 0.0
    last_message: float = 0.0
    figures: Figures = IDLE
    earlier: Figures = IDLE  # what its earlier lives counted
    source: str = ""  # where others find its pages
    tickets: dict[str, Ticket] = field(default_factory=dict)  # by key
    parked: dict[str, Ticket] = field(default_factory=dict)  # likewise
    replies: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is ready and when it ends

    @property
    def takes(self) -> bool:
        return self.ready and not self.leaving


class Cluster:
    """begins: the first message to each worker; link: makes the way to a new life of a worker; step_timeout: seconds that a step may take
    before its worker is killed, 0 for no limit. RedraftError of `prepare`: a worker cannot begin."""

    def __init__(self, front: Headless, begins: Seq[Begin], router: OpenRouter, link: Callable[[], Link], *, step_timeout: float) -> None:
        self.front, self.router, self._link, self.step_timeout = front, router, link, step_timeout
        self.members = [Member(begin) for begin in begins]
        self.workers = tuple(begin.name for begin in begins)
        self.moved = 0  # requests whose worker ended or left, so that another one computes them
        self._split = any(LAST in begin.stages for begin in begins)
        if router.any_stage and not self._split:
            raise InvalidInput("router: this one splits requests; it needs --instances, such as prefill=1,decode=1")
        self._tickets: dict[str, Ticket] = {}
        self._numbers = itertools.count()
        self._failed: RedraftError | None = None
        self._serving = self._ending = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._deliver: Callable[[list[Event]], None] = lambda events: None

    # ---- the life of the workers

    async def prepare(self) -> None:
        """Starts the workers, the first one alone, because it writes what the others find in caches. RedraftError if one cannot begin."""
        self.loop = asyncio.get_running_loop()
        for some in (self.members[:1], self.members[1:]):
            for member in some:
                self._start(member)
            for member in some:
                await member.changed.wait()
                if not member.ready:
                    await self.stop()
                    raise self._failed or Unavailable(f"worker {member.begin.name} ended while it started")

    def start(self, deliver: Callable[[list[Event]], None], dead: Callable[[BaseException], None]) -> None:
        self._deliver, self._serving = deliver, True
        self._spawn(self._watch())

    async def stop(self) -> None:
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._end(member) for member in self.members))

    async def restart(self) -> None:
        """One worker after the other: its requests go to others, it ends, and starts again."""
        for member in self.members:
            if not member.ready:
                continue
            member.leaving = True
            for ticket in [*member.tickets.values(), *member.parked.values()]:
                self._take_back(ticket)
                self._place(ticket)
            await self._end(member)
            while not (member.ready or self._ending):
                member.changed.clear()
                await member.changed.wait()

    def _start(self, member: Member) -> None:
        member.link = link = self._link()
        member.ready = member.leaving = member.outdated = member.hangs = False
        member.starts += 1
        member.began = member.last_message = monotonic()
        member.changed.clear()
        link.start(member.begin, lambda message: self._take(member, link, message), lambda: self._gone(member))

    async def _end(self, member: Member) -> None:
        """Ends a worker, at once if it does not by itself."""
        link = member.link
        if link is None:
            return
        link.send(Stop())
        until = monotonic() + STOPPING
        while member.link is link:
            member.changed.clear()
            try:
                await asyncio.wait_for(member.changed.wait(), max(0.01, until - monotonic()))
            except TimeoutError:
                link.kill()
                until = monotonic() + STOPPING

    def _gone(self, member: Member) -> None:
        """The worker ended, whatever the reason. It starts again, and its requests go elsewhere."""
        steady, asked = monotonic() - member.began >= STEADY, member.leaving
        outside = asked or (member.link is not None and member.link.killed and not member.hangs)
        member.quick = 0 if steady or asked else member.quick + 1
        member.earlier = member.figures.after(member.earlier)
        member.link, member.ready, member.figures = None, False, IDLE
        member.changed.set()
        tickets, replies = list(member.tickets.values()), list(member.replies.values())
        parked = list(member.parked.values())
        member.tickets, member.replies, member.parked = {}, {}, {}
        for reply in replies:
            if not reply.done():
                reply.set_exception(Unavailable(f"worker {member.begin.name} ended"))
        if self._ending:
            return
        if self._serving and not asked:
            log.error("worker %s ended; requests that go on elsewhere: %d", member.begin.name, len(tickets))
        for ticket in parked:
            ticket.left = None
            if ticket.worker is None:  # no worker has adopted it yet
                self._place(ticket)
        for ticket in tickets:
            ticket.worker = None
            ticket.deaths += not outside
            if ticket.beyond:
                self._forget(ticket)
            self._place(ticket)
        pause = 0.0 if member.quick < 2 else min(LONGEST_PAUSE, 2.0 ** (member.quick - 2))
        self._spawn(self._again(member, pause))

    async def _again(self, member: Member, pause: float) -> None:
        await asyncio.sleep(pause)
        self._start(member)

    async def _watch(self) -> None:
        """Kills workers whose step does not end, and frees pages that wait too long for memory."""
        while True:
            await asyncio.sleep(TICK)
            self._unlock()
            for member in self.members:
                if member.ready and self.step_timeout and (busy := self._busy(member)) > self.step_timeout:
                    log.error("worker %s: its step has taken %.0f seconds; it is ended", member.begin.name, busy)
                    assert member.link is not None
                    member.ready, member.hangs = False, True
                    member.link.kill()

    def _unlock(self) -> None:
        """Workers that park requests and adopt others may wait for each other's memory. A request that waits for long loses its pages, and
        is computed again."""
        late = monotonic() - ADOPTED
        for ticket in list(self._tickets.values()):
            if ticket.left is not None and ticket.worker is not None and ticket.worker.parked and ticket.sent < late:
                self._forget(ticket)

    def _busy(self, member: Member) -> float:
        silent = monotonic() - member.last_message
        return max(member.figures.busy, silent if silent > QUIET else 0.0)

    # ---- figures

    @property
    def alive(self) -> bool:
        return not self._ending

    @property
    def free(self) -> int:
        def running(member: Member) -> int:
            return sum(t.request.params.n for t in member.tickets.values() if t.request.admitted is not None)

        return sum(max(0, self.front.scheduler.max_seqs - running(member)) for member in self.members if member.takes)

    def figures(self) -> dict[str, Figures]:
        return {
            m.begin.name: m.figures._replace(busy=self._busy(m) if m.ready else 0.0, ready=m.takes, starts=m.starts).after(m.earlier)
            for m in self.members
        }

    def worker(self, request_id: str) -> str:
        ticket = self._tickets.get(request_id)
        return "" if ticket is None or ticket.worker is None else ticket.worker.begin.name

    def _load(self, member: Member) -> Load:
        queued = running = held = 0
        for ticket in (*member.tickets.values(), *member.parked.values()):
            params, size = ticket.request.params, len(ticket.request.prompt)
            running += params.n if ticket.began and ticket.worker is member else 0
            queued += 0 if ticket.began else size
            held += params.n * -(-min(self.front.max_model_len, size + (params.max_tokens or self.front.max_model_len)) // PAGE)
        return Load(queued, running, max(0, self.front.blocks - held), member.takes, member.starts, member.begin.stages)

    # ---- requests

    async def add(self, requests: Seq[Request]) -> None:
        tickets = []
        for request in requests:
            if request.params.seed is None:
                request.params = request.params.but(seed=secrets.randbits(63))
            n = request.params.n
            added = asyncio.get_running_loop().create_future()
            ticket = Ticket(request, added, [[] for _ in range(n)], [Stats() for _ in range(n)], [False] * n)
            self._tickets[request.id] = ticket
            tickets.append(ticket)
        for ticket in tickets:
            self._place(ticket)
        done = await asyncio.gather(*(ticket.added for ticket in tickets), return_exceptions=True)
        if refused := next((one for one in done if one is not None), None):
            for request in requests:
                self.abort(request.id)
            raise refused

    def abort(self, request_id: str) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            self._take_back(ticket)
            if not ticket.added.done():
                ticket.added.set_exception(Unavailable("the request was ended before a worker took it"))

    def _place(self, ticket: Ticket) -> None:
        """Sends a request to the worker that the router chooses. Without a worker it waits for one."""
        if ticket.deaths >= DEATHS:
            self._fail(ticket, Unavailable(f"{DEATHS} workers ended while they computed this request"))
            return
        left, request = ticket.left, ticket.request
        if (member := ticket.last if left is not None else None) is None or not member.takes:
            try:
                member = self._route(request, 0 if left is None else LAST)
                parks = self._split and left is None and LAST not in member.begin.stages
                if self.router.any_stage and left is None:  # it chooses both places at once
                    ticket.last = self._route(request, LAST)
                    parks = ticket.last is not member
            except Unavailable:
                return
        self.moved += ticket.attempt > 0 and left is None
        ticket.attempt += 1
        ticket.worker, ticket.sent = member, monotonic()
        member.tickets[ticket.key] = ticket
        job = Job.of(ticket.key, request, ticket.progress)
        if left is None:
            reply = self._ask(member, lambda number: Add(number, job, parks))
        else:
            reply = self._ask(member, lambda number: Adopt(number, job, left.parcel, left.member.source))
        reply.add_done_callback(partial(self._added, ticket, ticket.key))

    def _route(self, request: Request, stage: int) -> Member:
        return self.members[self.router.route(request, [self._load(member) for member in self.members], stage)]

    def _added(self, ticket: Ticket, key: str, reply: asyncio.Future[Any]) -> None:
        error = None if reply.cancelled() else reply.exception()
        if ticket.worker is None or ticket.key != key:
            return  # aborted, or with another worker meanwhile
        if error is None:
            if not ticket.added.done():
                ticket.added.set_result(None)
            return
        self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """The request ends with this error: where it is added if it never was, else as an event."""
        self._take_back(ticket)
        self._tickets.pop(ticket.request.id, None)
        if not ticket.added.done():
            ticket.added.set_exception(error)
        elif isinstance(error, Exception):
            self._deliver([Event.failed(ticket.request, error)])

    def _take_back(self, ticket: Ticket) -> None:
        """The worker, if there is one, no longer computes the request."""
        member, ticket.worker = ticket.worker, None
        if member is not None and member.tickets.pop(ticket.key, None) is not None and member.link is not None:
            member.link.send(Abort(ticket.key))
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        """The worker that has parked the request, if there is one, frees its pages."""
        left, ticket.left = ticket.left, None
        if left is not None and left.member.parked.pop(left.key, None) is not None and left.member.link is not None:
            left.member.link.send(Abort(left.key))

    # ---- messages

    def _take(self, member: Member, link: Link, message: Any) -> None:
        if member.link is not link:
            return
        member.last_message = monotonic()
        match message:
            case Pieces(pieces):
                self._events(member, pieces)
            case Parked(key, parcel):
                if (ticket := member.tickets.pop(key, None)) is not None:
                    member.parked[key] = ticket
                    ticket.left, ticket.worker, ticket.beyond = Left(member, key, parcel), None, False
                    self._place(ticket)
            case Settled(key):
                if (ticket := member.tickets.get(key)) is not None:
                    self._forget(ticket)
            case State(figures, admitted):
                member.figures = figures
                for key in admitted:
                    if (ticket := member.tickets.get(key)) is not None and ticket.request.admitted is None:
                        ticket.request.admitted = monotonic()
            case Reply(number, value, error):
                if (reply := member.replies.pop(number, None)) is not None and not reply.done():
                    reply.set_result(value) if error is None else reply.set_exception(error)
            case Ready() if member.outdated:
                member.leaving = True
                link.send(Stop())
            case Ready(figures, source):
                member.figures, member.ready, member.source = figures, True, source
                member.changed.set()
                if member.starts > 1:
                    log.warning("worker %s started again", member.begin.name)
                for ticket in [ticket for ticket in self._tickets.values() if ticket.worker is None]:
                    self._place(ticket)
            case Failed(error):
                self._failed = error  # that of the start, if nothing is served yet
                if self._serving:
                    log.error("worker %s cannot begin: %s", member.begin.name, error)

    def _events(self, member: Member, pieces: list[Piece]) -> None:
        events, ended = [], []
        for piece in pieces:
            if (ticket := member.tickets.get(piece.key)) is None:
                continue  # aborted, or with another worker
            request, i = ticket.request, piece.text_index
            if piece.about is not None:
                piece.about.tell(request, ticket.sent)
            if piece.tokens:
                ticket.deaths, ticket.beyond = 0, True
            ticket.tokens[i] += piece.tokens
            ticket.stats[i], ticket.ended[i] = piece.stats, piece.reason is not None
            events.append(piece.event(request))
            if piece.error is not None or all(ticket.ended):
                ended.append(ticket)
        self._deliver(events)
        for ticket in ended:
            if member.tickets.pop(ticket.key, None) is not None:
                self._tickets.pop(ticket.request.id, None)
                self._forget(ticket)

    def _ask(self, member: Member, message: Callable[[int], Any]) -> asyncio.Future[Any]:
        """The reply to a message with a number."""
        number, reply = next(self._numbers), asyncio.get_running_loop().create_future()
        member.replies[number] = reply
        assert member.link is not None
        member.link.send(message(number))
        return reply

    def _spawn(self, what: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- every worker

    async def _all(self, name: str, *arguments: Any) -> list[Any]:
        asked = [self._ask(m, lambda number: Call(number, name, arguments)) for m in self.members if m.ready]
        return await asyncio.gather(*asked)

    async def check(self) -> list[tuple[int, int]]:
        """Of each worker, the blocks and the texts that it holds. AssertionError if an invariant of its memory is broken."""
        return await self._all("check")

    async def forget_prefixes(self) -> int:
        return sum(await self._all("forget_prefixes"))

    async def load_lora(self, name: str, folder: Path) -> None:
        await asyncio.shield(self._spawn(self._load_lora(name, str(folder))))  # whoever waits may leave; half of it must not stay

    async def unload_lora(self, name: str) -> None:
        await asyncio.shield(self._spawn(self._unload_lora(name)))

    async def _load_lora(self, name: str, folder: str) -> None:
        if name in (before := self._adapters()):
            raise InvalidInput(f"lora = {shown(name)}: an adapter of this name is loaded; unload it first")
        self._begin_with({**before, name: folder})
        asked = [self._ask(m, lambda number: Call(number, "load_lora", (name, folder))) for m in self.members if m.ready]
        done = await asyncio.gather(*asked, return_exceptions=True)
        # a worker that ended starts again with the adapter
        if refused := next((one for one in done if isinstance(one, BaseException) and not isinstance(one, Unavailable)), None):
            await self._drop_lora(name)
            raise refused
        self.front.name_adapters([*self.front.adapters, name])

    async def _unload_lora(self, name: str) -> None:
        """Requests that chose it may still come to another worker, so the workers keep it until these end."""
        self.front.name_adapters(known for known in self.front.adapters if known != name)
        while any(ticket.request.params.lora == name for ticket in self._tickets.values()):
            await asyncio.sleep(SOON)
        await self._drop_lora(name)

    async def _drop_lora(self, name: str) -> None:
        """In every worker that has it."""
        self._begin_with({known: folder for known, folder in self._adapters().items() if known != name})
        asked = [self._ask(m, lambda number: Call(number, "unload_lora", (name,))) for m in self.members if m.ready]
        await asyncio.gather(*asked, return_exceptions=True)

    def _adapters(self) -> dict[str, str]:
        """The folders of the adapters that workers have, by name; requests may choose those that the front names."""
        return dict(self.members[0].begin.config.model.adapters)

    def _begin_with(self, folders: dict[str, str]) -> None:
        """Sets the adapters with which workers begin. One that begins now does so again."""
        for member in self.members:
            config = member.begin.config
            member.begin = member.begin._replace(config=config.but(model=config.model.but(lora=folders)))
            member.outdated = member.outdated or (member.link is not None and not member.ready)
