"""What the front and a worker send to each other. Worker and front are processes of one installation, so messages are pickled."""

from __future__ import annotations

from typing import Any, NamedTuple

from redraft import errors
from redraft.config import EngineConfig, SamplingParams
from redraft.core.distribution import TopLogprobs
from redraft.core.sequence import FinishReason, Request, Wants
from redraft.core.tree import F32, F64
from redraft.engine.output import Event, Progress, Provenance, Stats
from redraft.errors import RedraftError
from redraft.workers.host import Figures


class Begin(NamedTuple):
    """The first message to a worker. name: of the worker; cores: CPUs that it may use, None for all; check: parameters that the engine
    must be able to serve; stages: of a request, which it runs (see sched/router.py); shares: other workers read its pages."""

    name: str
    config: EngineConfig
    cores: tuple[int, ...] | None
    check: SamplingParams
    stages: tuple[int, ...] = (0,)
    shares: bool = False


class Job(NamedTuple):
    """A request on its way to a worker. key: its name there; progress: of its texts, if it goes on."""

    key: str
    prompt: list[int]
    params: SamplingParams
    salt: str
    priority: int
    wants: Wants
    reuse: str
    before: list[int]
    chunks: list[tuple[int, int]]
    context: int | None
    vectors: F32 | None = None
    progress: tuple[Progress, ...] = ()

    @classmethod
    def of(cls, key: str, request: Request, progress: tuple[Progress, ...] = ()) -> Job:
        """What the front has already of the prompt is not computed again."""
        params, wants = request.params, request.wants
        if request.prompt_logprobs:
            params, wants = params.but(prompt_logprobs=None), wants._replace(prompt_logprobs=None)
        return cls(
            key, request.prompt, params, request.salt, request.priority, wants, request.reuse, request.before, request.chunks,
            request.context, request.vectors, progress,
        )  # fmt: skip

    def request(self) -> Request:
        return Request(
            self.key, self.prompt, self.params, self.salt, priority=self.priority, wants=self.wants, reuse=self.reuse, before=self.before,
            chunks=self.chunks, context=self.context, vectors=self.vectors,
        )  # fmt: skip


class Add(NamedTuple):
    """Adds a request. The answer is a Reply. parks: another worker goes on with it after its first new tokens; see Parked."""

    number: int
    job: Job
    parks: bool = False


class Parked(NamedTuple):
    """The request is ready to be adopted by another worker. parcel: what that worker needs beside the Job (Parcel.numbers)."""

    key: str
    parcel: dict[str, Any]


class Adopt(NamedTuple):
    """Adds a request that another worker has parked. source: where the pages of that worker are. The answer is a Reply."""

    number: int
    job: Job
    parcel: dict[str, Any]
    source: str


class Settled(NamedTuple):
    """The request needs the worker that had parked it no more."""

    key: str


class Abort(NamedTuple):
    key: str


class Call(NamedTuple):
    """Calls a method of the worker by its name. The answer is a Reply."""

    number: int
    name: str
    arguments: tuple[Any, ...] = ()


class Stop(NamedTuple):
    """Ends the worker after its current step."""


class Ready(NamedTuple):
    """The worker takes requests. source: where other workers find its pages."""

    figures: Figures
    source: str = ""


class Failed(NamedTuple):
    """The worker cannot begin."""

    error: RedraftError


class Reply(NamedTuple):
    number: int
    value: Any = None
    error: Exception | None = None


class About(NamedTuple):
    """What the engine has found about a request. waited: seconds until it was admitted."""

    waited: float
    cached_tokens: int | None
    disk: tuple[int, float]
    reused_tokens: int
    repaired_tokens: int
    repair_rows: float
    miss: Any
    prompt_logprobs: list[TopLogprobs | None]
    pooled: tuple[F64, int] | None

    @classmethod
    def of(cls, request: Request, arrived: float) -> About:
        waited = max(0.0, (request.admitted or arrived) - arrived)
        disk, repaired = (request.disk_tokens, request.disk_seconds), (request.reused_tokens, request.repaired_tokens, request.repair_rows)
        return cls(waited, request.cached_tokens, disk, *repaired, request.miss, request.prompt_logprobs, request.pooled)

    def tell(self, request: Request, sent: float) -> None:
        """Fills the front's request. What it has from an earlier worker stays."""
        if request.admitted is None:
            request.admitted = sent + self.waited
        if request.cached_tokens is None:
            request.cached_tokens, request.reused_tokens, request.miss = self.cached_tokens, self.reused_tokens, self.miss
            request.repaired_tokens, request.repair_rows = self.repaired_tokens, self.repair_rows
            request.disk_tokens, request.disk_seconds = self.disk
        request.prompt_logprobs = request.prompt_logprobs or self.prompt_logprobs
        request.pooled = self.pooled


class Piece(NamedTuple):
    """An event on its way to the front. about: in the first and the last of a request."""

    key: str
    text_index: int
    tokens: list[int]
    text: str
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    reason: FinishReason | None
    stats: Stats
    provenance: list[Provenance]
    error: Exception | None
    stop: str | None
    about: About | None

    @classmethod
    def of(cls, event: Event, about: About | None) -> Piece:
        error = None if event.error is None else plain(event.error)
        return cls(
            event.request.id, event.index, event.tokens, event.text, event.drafted, event.logprobs, event.reason, event.stats,
            event.provenance, error, event.stop, about,
        )  # fmt: skip

    def event(self, request: Request) -> Event:
        return Event(
            request, self.text_index, self.tokens, self.text, self.drafted, self.logprobs, self.reason, self.stats, self.provenance,
            self.error, self.stop,
        )  # fmt: skip


class Pieces(NamedTuple):
    """The events of a step."""

    pieces: list[Piece]


class State(NamedTuple):
    """Sent regularly. admitted: keys of requests that run since the last one."""

    figures: Figures
    admitted: list[str]


class WorkerError(Exception):
    """An error inside a worker that is not meant for users. The worker's log has it."""


def plain(error: BaseException) -> Exception:
    """The error without what it refers to: of the nearest class that users know."""
    known = next((cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__), None)
    return WorkerError(f"{type(error).__name__}: {error}") if known is None else known(str(error))
