"""The interface of what computes a server's requests: one engine in this process, or many workers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple, Protocol

from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.engine.output import Event
from redraft.kv.disk.pages import DiskPages


class Disk(NamedTuple):
    """found: tokens whose pages were read, in so many seconds; written, dropped: pages; bytes: of all files of the folder."""

    found: int = 0
    seconds: float = 0.0
    written: int = 0
    dropped: int = 0
    bytes: int = 0

    def after(self, earlier: Disk) -> Disk:
        found, written, dropped = self.found + earlier.found, self.written + earlier.written, self.dropped + earlier.dropped
        return Disk(found, self.seconds + earlier.seconds, written, dropped, self.bytes)

    @classmethod
    def of(cls, disk: DiskPages | None) -> Disk:
        """Any thread may ask."""
        return cls() if disk is None else cls(disk.found * disk.page, disk.seconds, disk.written, disk.dropped, disk.files.total or 0)


class Figures(NamedTuple):
    """The state of a worker. running, waiting: texts; used, blocks, published: blocks of its pool; shared: pages that several texts
    read; busy: seconds since the current step began, 0 while it waits; ready: whether it takes requests; starts: how often it started;
    copied, found: tokens whose pages it copied from another worker, or had already; lost: texts whose pages it could not copy; disk: what
    it read from and wrote to disk."""

    running: int = 0
    waiting: int = 0
    used: int = 0
    blocks: int = 1
    shared: int = 0
    published: int = 0
    opened: int = 0
    opened_bytes: int = 0
    preemptions: int = 0
    busy: float = 0.0
    ready: bool = True
    starts: int = 1
    copied: int = 0
    found: int = 0
    lost: int = 0
    disk: Disk = Disk()

    def after(self, earlier: Figures) -> Figures:
        """With what an earlier life of the worker has counted."""
        return self._replace(
            preemptions=self.preemptions + earlier.preemptions,
            copied=self.copied + earlier.copied,
            found=self.found + earlier.found,
            lost=self.lost + earlier.lost,
            disk=self.disk.after(earlier.disk),
        )

    @classmethod
    def of(cls, engine: Engine, busy: float = 0.0) -> Figures:
        """Any thread may ask."""
        memory, table = engine.memory, engine.table
        return cls(
            len(engine.running), len(engine.waiting), memory.used(), memory.blocks, table.shared(), len(table.prefix.nodes),
            engine.opened.count, engine.opened.bytes, engine.preemptions, busy,
            copied=engine.arrivals.copied, found=engine.arrivals.found, lost=engine.arrivals.lost, disk=Disk.of(engine.runner.disk),
        )  # fmt: skip


class Host(Protocol):
    """All is called in the event loop, and so are the functions that `start` gets."""

    workers: tuple[str, ...]
    """The names of all workers."""

    @property
    def alive(self) -> bool:
        """Whether requests can be computed, now or after a worker has started again."""
        ...

    async def prepare(self) -> None:
        """Comes first, and returns when requests can be computed. RedraftError if they cannot be."""
        ...

    def start(self, deliver: Callable[[list[Event]], None], dead: Callable[[BaseException], None]) -> None:
        """deliver: gets the events of a step; dead: is called if nothing can be computed any more."""
        ...

    async def stop(self) -> None:
        """Ends after the current step."""
        ...

    async def restart(self) -> None:
        """Several workers start again, one after the other, while the others compute. A single one stays."""
        ...

    @property
    def free(self) -> int:
        """Texts that could begin at once."""
        ...

    def figures(self) -> dict[str, Figures]:
        """By the name of the worker."""
        ...

    def worker(self, request_id: str) -> str:
        """The name of the worker that computes a request, or empty while none does."""
        ...

    async def add(self, requests: Seq[Request]) -> None:
        """All or none. RedraftError if one is refused."""
        ...

    def abort(self, request_id: str) -> None:
        """No event of the request is delivered after it."""
        ...

    async def forget_prefixes(self) -> int:
        """Frees the published pages that no text lists, and returns their number."""
        ...

    async def load_lora(self, name: str, folder: Path) -> None:
        """As LLM.load_lora, in every worker."""
        ...

    async def unload_lora(self, name: str) -> None:
        """As LLM.unload_lora, in every worker."""
        ...
