"""Which pages are on disk, how they get there and back.

The name of a page is an HMAC of the name of the page before and of its own tokens; that of a text's first page is one of the form of the
model and of the salt, with the adapter and the tenant in it. So a name says nothing about texts or tenants to whoever does not know
the secret, and a file is found by exactly those prefixes whose keys and values it has.

A thread writes. It copies a page of the pool without waiting for the engine, and drops the copy if the page was evicted meanwhile, since
it may be written again then. What is read is copied into pages of the pool; no file is mapped.
"""

from __future__ import annotations

import atexit
import hmac
import logging
import weakref
from collections.abc import Sequence as Seq
from math import prod
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any

import numpy as np

from redraft import kept
from redraft.config import PREFIX_CACHE_SIZE
from redraft.core.sequence import UNLIMITED, Space
from redraft.core.tree import I32
from redraft.errors import InvalidInput, shown
from redraft.kv.disk.files import HEAD, ROOT, Files, Link
from redraft.kv.paged import Paged
from redraft.kv.parcel import Lost, StoredLane, StoredText
from redraft.kv.prefix import Node
from redraft.ops.arrays import array
from redraft.ops.format import Arrays

log = logging.getLogger(__name__)

NAME = 16  # bytes of a name
MOST_QUEUED = 4096  # listings that wait to be written; more are dropped
REST = 30.0  # seconds without writing after the disk refused a page
PATIENCE = 5.0  # seconds for what is left to write when the process ends


class Broken(Lost):
    """A page that cannot be used. index: its place in the text."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Found:
    """Pages on disk that continue the first `attached` pages of a text. A source; see engine/parcel.py."""

    def __init__(self, disk: DiskPages, attached: int, links: list[Link]) -> None:
        self.disk, self.attached, self.links = disk, attached, links

    def __len__(self) -> int:
        return len(self.links)

    @property
    def stored(self) -> StoredText:
        """As the export of another engine."""
        count, size = self.attached + len(self.links), self.disk.page
        lane = StoredLane(count * size)
        return StoredText(count * size, Space(), "", UNLIMITED, [lane], list(range(count)), [], [], [])

    def read(self, space: Space, pages: I32) -> Arrays:
        """Broken names the first page that cannot be read."""
        assert space == Space(), f"{space}: only plain pages are on disk"
        arrays = {name: np.empty((len(pages), *shape), dtype) for name, shape, dtype in self.disk.layout}
        for i, page in enumerate(pages.tolist()):
            self.disk.read(self.links[page - self.attached], page, [_bytes(held[i]) for held in arrays.values()])
        return arrays


class DiskPages:
    """The published pages of `paged` in `folder`. room: the most bytes of all files there, PREFIX_CACHE_SIZE if None; form: what else
    decides the bits of a page, by name; model, described: for a list of the folder. InvalidInput says what is wrong with folder or room.

    found: pages that were read; seconds: that this took; written, dropped: pages that were written, or were not because the writer, the
    disk or the room could not take them.
    """

    def __init__(self, paged: Paged, folder: Path, room: int | None, form: dict[str, str], model: str = "", described: str = "") -> None:
        self.store, self.page = paged.store, paged.table.page
        self.found = self.written = self.dropped = 0
        self.seconds = 0.0
        sample = self.store.read(Space(), np.zeros(1, np.int32))
        self.layout = [(name, one.shape[1:], one.dtype) for name, one in sorted((name, array(x)) for name, x in sample.items())]
        size = sum(prod(shape) * dtype.itemsize for _, shape, dtype in self.layout)
        room = PREFIX_CACHE_SIZE if room is None else room
        if room < (least := 2 * (HEAD + size)):
            raise InvalidInput(f"CacheConfig.prefix_cache_size = {room}: must be at least {least} bytes, two pages of this model")
        self._secret = secret_of(folder)
        layout = repr([(name, shape, dtype.name) for name, shape, dtype in self.layout])
        self._form = self._hash(repr(sorted(form.items())).encode(), layout.encode(), str(self.page).encode())
        try:
            self.files = Files(folder, self._form.hex(), size, room, self._secret, {"model": model, "form": described})
        except OSError as error:
            raise _refused(folder, error) from None
        self._queue: SimpleQueue[Seq[Node] | Event | None] = SimpleQueue()
        self._rests = -REST  # when the disk refused a page
        self._bad: set[Link] = set()  # that the log has a line about
        weakref.finalize(self, self._queue.put, None)
        _OPEN.add(self)
        Thread(target=_write, args=(self._queue, weakref.ref(self)), name="redraft-disk", daemon=True).start()

    # ---- from the engine's thread

    def listed(self, nodes: Seq[Node]) -> None:
        """Takes pages that were published, or the last one that a text found. Returns at once."""
        if self._queue.qsize() < MOST_QUEUED:
            self._queue.put(nodes)
        else:
            self.dropped += len(nodes)

    def find(self, tokens: Seq[int], salt: str, nodes: Seq[Node]) -> Found:
        """The pages on disk after the published pages `nodes` of this text, at most len(tokens) - 1 tokens with these."""
        last = self._name(nodes[-1]) if nodes else self._first(salt)
        links: list[Link] = []
        for end in range((len(nodes) + 1) * self.page, len(tokens), self.page):
            name = self._next(last, tokens[end - self.page : end])
            link = Link(name.hex(), last.hex() if end > self.page else ROOT)
            if link in self._bad or not self.files.has(link):
                break
            links.append(link)
            last = name
        return Found(self, len(nodes), links)

    def read(self, link: Link, index: int, into: Seq[memoryview]) -> None:
        try:
            self.files.read(link, into)
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):  # it left meanwhile
                log.warning("%s/%s: a page on disk is not used: %s", self.files.place, link.name, error)
                self._bad.add(link)
                self.files.drop(link)
            raise Broken(index, str(error)) from None

    def flush(self, seconds: float = PATIENCE) -> bool:
        """Waits until the pages that were listed so far are written. Whether they are."""
        done = Event()
        self._queue.put(done)
        return done.wait(seconds)

    def clear(self) -> None:
        """Removes all pages of this form of the model."""
        self.flush()
        self.files.clear()
        self._bad.clear()

    # ---- names

    def _hash(self, *parts: bytes) -> bytes:
        return hmac.digest(self._secret, b"".join(len(part).to_bytes(8, "little") + part for part in parts), "sha256")[:NAME]

    def _first(self, salt: str) -> bytes:
        return self._hash(self._form, salt.encode("utf-8", "surrogatepass"))

    def _next(self, last: bytes, tokens: Seq[int]) -> bytes:
        return self._hash(last, np.array(tokens, np.int32).tobytes())

    def _name(self, node: Node) -> bytes:
        """Of a page that was published. A node keeps it."""
        if not node.name:
            last = self._first(node.key[0])
            for one in reversed(_chain(node)):
                last = one.name = one.name or self._next(last, one.key[1])
        return node.name

    def _link(self, node: Node) -> Link:
        name, before = self._name(node).hex(), node.parent
        return Link(name, ROOT if before is None or before.parent is None else self._name(before).hex())

    # ---- the thread

    def take(self, nodes: Seq[Node]) -> None:
        """Writes those of these pages, and of the pages before them, that are not on disk."""
        done = 0
        try:
            if self.files.total is None:
                self.files.look()
            for node in nodes:
                if monotonic() - self._rests < REST or not self._kept(node):
                    break
                done += 1
        except Exception as error:
            self._rests = monotonic()
            log.warning("%s: no pages are written for %.0f s: %s", self.files.folder, REST, _reason(error))
        self.dropped += len(nodes) - done

    def _kept(self, node: Node) -> bool:
        """Whether the page and all before it are on disk now."""
        chain = _chain(node)
        count = next((i for i, one in enumerate(chain) if self.files.touch(self._link(one))), len(chain))
        if count and len(chain) * self.files.file_size > self.files.room:
            return False  # the first pages of the text would leave for the last ones
        for one in reversed(chain[:count]):
            if not one.alive:
                return False
            held = self.store.read(Space(), np.array([one.page], np.int32))
            copies = [_bytes(np.ascontiguousarray(array(held[name]))) for name, _, _ in self.layout]
            if not one.alive:  # evicted while it was copied
                return False
            self.files.write(self._link(one), copies)
            self._bad.discard(self._link(one))
            self.written += 1
        return True


def _chain(node: Node) -> list[Node]:
    """The page and those before it, the first of the text last."""
    found, at = [], node
    while at.parent is not None:
        found.append(at)
        at = at.parent
    return found


def secret_of(folder: Path) -> bytes:
    """The secret of a folder of pages, which is made if there is none. InvalidInput says what is wrong with it."""
    try:
        kept.private(folder)
        return kept.secret(folder)
    except (OSError, ValueError) as error:
        raise _refused(folder, error) from None


def _refused(folder: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"CacheConfig.prefix_cache_dir = {shown(str(folder))}: {_reason(error)}")


def _write(queue: SimpleQueue[Any], disk: weakref.ref[DiskPages]) -> None:
    given: Any = ()  # at first nothing, so that the files are counted
    while given is not None:
        if isinstance(given, Event):
            given.set()
        elif (here := disk()) is not None:
            here.take(given)
            del here
        given = queue.get()


def _bytes(held: Any) -> memoryview:
    return memoryview(held.reshape(-1).view(np.uint8)).cast("B")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error) or repr(error)


_OPEN: weakref.WeakSet[DiskPages] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """Writes what is left."""
    until = monotonic() + PATIENCE
    for disk in list(_OPEN):
        disk.flush(max(0.0, until - monotonic()))
