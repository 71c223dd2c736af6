"""The interface of routers: a function from a request and the loads of the workers to the worker that runs it.

A request runs in stages. Most workers run all of it, which is stage 0. Where prompts and decoding are split, stage 0 is the prompt and
stage 1 the rest. A router is asked once for each stage: at arrival, or when the stage before it ends. If both places are equal, nothing
is handed over.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open`. What `open` returns lives as long as the front and
may keep what it decided. Decisions depend on requests and loads alone, without clocks, input or output. The simulator runs the same class.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar, NamedTuple, Protocol

from redraft.card import Card
from redraft.core.sequence import Request
from redraft.errors import Unavailable

FIRST = (0,)
BLOCK = 32  # tokens, as many as a page of the cache has
TEXT = 128  # tokens that a text is expected to draw still


class Load(NamedTuple):
    """What a front knows of a worker from its own records: a request counts from the moment that it is sent.

    queued_tokens: prompt tokens of requests that have drawn no token there yet; running: texts that draw tokens there, and
    those that will come there after their prompt; free_blocks: blocks of BLOCK tokens that none of its requests holds or can come to need;
    alive: whether it takes new requests; starts: how often it was started, so that a change means that its cache is empty; stages: the
    stages that it runs.
    """

    queued_tokens: int = 0
    running: int = 0
    free_blocks: int = 0
    alive: bool = True
    starts: int = 0
    stages: tuple[int, ...] = FIRST

    @property
    def tokens(self) -> int:
        """Tokens to compute: those of queued prompts and the ones that texts are expected to draw."""
        return self.queued_tokens + TEXT * self.running


class OpenRouter(Protocol):
    """An opened router. any_stage: it may place a stage at a worker that does not list it in Load.stages."""

    any_stage: ClassVar[bool]

    def route(self, request: Request, loads: Seq[Load], stage: int = 0) -> int:
        """The index in `loads` of the worker for this stage. Reads the request's prompt, params and salt. `loads` is not kept. Raises
        Unavailable if no worker that is alive runs the stage."""
        ...


class Router(Protocol):
    """A registered router: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self) -> OpenRouter: ...


def serving(loads: Seq[Load], stage: int) -> list[int]:
    """The workers that take requests for this stage. Raises Unavailable if there are none."""
    found = [i for i, load in enumerate(loads) if load.alive and stage in load.stages]
    if not found:
        raise Unavailable(f"none of {len(loads)} workers can take stage {stage} of a request now")
    return found


def least(workers: Seq[int], loads: Seq[Load]) -> int:
    """The worker with the fewest tokens to compute; the first of equal ones."""
    return min(workers, key=lambda i: loads[i].tokens)
