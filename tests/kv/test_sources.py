"""Pages of another engine, read from shared memory and over TCP: the same as in its own memory, or an error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft.core.plan import Accepted, Work
from redraft.core.sequence import CachePlan, Lanes, Sequence, Space
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.errors import Unsupported
from redraft.kv.parcel import Lost
from redraft.kv.remote import Address, PageServer, RemotePages
from redraft.kv.shared import SharedMemory, SharedPages
from redraft.models.runner import Runner
from redraft.ops import library
from redraft.ops.format import Format, plain
from redraft.ops.native import NativeOps
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.reference import Reference
from tests.arrays import placed
from tests.contracts import plain as definition

SECRET = b"of these tests only"
BACKENDS: dict[str, Callable[[], Any]] = {"numpy": lambda: NumpyOps("float32"), "native": lambda: NativeOps("bfloat16")}
LINUX = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous files are Linux's")


def runner(backend: Any, memory: SharedMemory | None = None) -> Runner:
    spec, weights = definition.tiny()
    made = Runner(spec, placed(backend, weights), backend, 12, room=None if memory is None else memory.room)
    made.memory.paged.define(Format("toy", plain(backend.dtype, spec.head_dim)))
    return made


def text(one: Runner, ident: int, plan: CachePlan, count: int = 70) -> Sequence:
    """An open text whose pages have random contents."""
    seq = sequence([i % definition.VOCAB for i in range(count + 1)])
    seq.id, seq.cache = ident, plan
    one.memory.open(seq)
    work = [Work(seq, count)]
    one.memory.reserve(work, [EMPTY])
    one.memory.commit(work, [Accepted()])
    space, pages = Space(plan.lanes, plan.format), one.memory.export(seq).pages
    dice, ids = np.random.default_rng(ident), np.array(pages, np.int32)
    held = {name: dice.standard_normal(array.shape).astype(array.dtype) for name, array in one.memory.read(space, ids).items()}
    store = one.memory.paged.store
    store.backend.write(store.pool, space, ids, held)
    return seq


class Source:
    """Two engines' memories and what reads the first one's for the second."""

    def __init__(self, kind: str, backend: str) -> None:
        if backend == "native" and library.load() is None:
            pytest.skip("no compiled kernels")
        self.shared = SharedMemory() if kind == "shared" else None
        self.here, self.there = runner(BACKENDS[backend](), self.shared), runner(BACKENDS[backend]())
        self.server = None if self.shared else PageServer(self.here.memory, SECRET)
        self.source = self.open()

    def open(self) -> Any:
        if self.shared is not None:
            return SharedPages(self.there.memory, self.shared.path)
        assert self.server is not None
        return RemotePages(self.there.memory, self.server.address, SECRET)

    def close(self) -> None:
        self.source.close()
        for one in (self.server, self.shared):
            if one is not None:
                one.close()


@pytest.fixture(params=[pytest.param("shared", marks=LINUX), "remote"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(BACKENDS))
def source(kind: str, request: pytest.FixtureRequest) -> Iterator[Source]:
    made = Source(kind, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("plan", [CachePlan(), CachePlan(lanes=Lanes.PER_HEAD, format="toy"), CachePlan(lanes=Lanes.PER_LAYER)])
def test_pages_arrive_as_they_are(source: Source, plan: CachePlan) -> None:
    here, there = source.here.memory, source.there.memory
    text(source.there, 9, plan)  # so that other pages are taken there
    seq, moved = text(source.here, 1, plan), sequence([i % definition.VOCAB for i in range(71)])
    moved.id, moved.cache = 2, plan
    stored = here.export(seq)
    there.import_(moved, stored, 0, source.source.read)
    there.check()
    again = there.export(moved)
    assert again.page_sums == stored.page_sums and len(set(stored.page_sums)) == len(stored.pages) and again.pages != stored.pages
    assert moved.stored == 70


def test_what_is_not_in_the_pool_is_lost(source: Source) -> None:
    for space, pages in ((Space(), [12]), (Space(), [0, 99]), (Space(Lanes.PER_HEAD, "other"), [0])):
        with pytest.raises(Lost):
            source.source.read(space, np.array(pages, np.int32))
    text(source.here, 1, CachePlan())
    assert source.source.read(Space(), np.array([0], np.int32))


def test_a_page_that_changed_is_lost(source: Source) -> None:
    """The engine freed it and wrote another text there."""
    seq, moved = text(source.here, 1, CachePlan()), sequence([i % definition.VOCAB for i in range(71)])
    stored = source.here.memory.export(seq)
    source.here.memory.free(seq)
    text(source.here, 5, CachePlan())
    with pytest.raises(Lost, match="3 pages arrived with other contents"):
        source.there.memory.import_(moved, stored, 0, source.source.read)
    assert source.there.memory.used() == 0


# ---- shared memory


@LINUX
def test_another_process_reads_shared_memory() -> None:
    memory = SharedMemory()
    one = runner(NumpyOps("float32"), memory)
    text(one, 1, CachePlan())
    code = "import mmap, os, sys; print(sum(mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)[:4096]))"
    done = subprocess.run([sys.executable, "-c", code, memory.path], capture_output=True, text=True, check=True)
    assert int(done.stdout) == int(one.memory.pool.data.reshape(-1).view(np.uint8)[:4096].sum())
    assert os.stat(memory.path).st_mode & 0o777 == 0o600
    memory.close()


@LINUX
def test_shared_memory_stays_while_it_is_mapped_and_is_gone_after() -> None:
    made = Source("shared", "numpy")
    text(made.here, 1, CachePlan())
    before, pages = made.source.read(Space(), np.array([0], np.int32)), np.array([0], np.int32)
    assert made.shared is not None
    made.shared.close()
    assert np.array_equal(made.source.read(Space(), pages)["page"], before["page"])
    with pytest.raises(OSError, match="No such file"):
        SharedPages(made.there.memory, made.shared.path).read(Space(), pages)


@LINUX
def test_a_file_that_may_shrink_is_not_mapped(tmp_path: Path) -> None:
    """A process that maps it would be ended by a signal."""
    there = runner(NumpyOps("float32"))
    file = tmp_path / "pool"
    file.write_bytes(bytes(there.memory.paged.store.block_bytes * 12))
    with pytest.raises(Lost, match="is not the pool of an engine"):
        SharedPages(there.memory, str(file)).read(Space(), np.array([0], np.int32))


def test_backends_with_memory_of_their_own_share_none() -> None:
    with pytest.raises(Unsupported, match="backend 'reference' has its pool in memory of its own"):
        Reference().allocate(definition.tiny()[0], 4, lambda size: np.zeros(size, np.uint8))


# ---- TCP


@pytest.fixture
def remote() -> Iterator[Source]:
    made = Source("remote", "numpy")
    text(made.here, 1, CachePlan())
    yield made
    made.close()


PAGE = np.array([0], np.int32)


def test_who_does_not_know_the_secret_gets_nothing(remote: Source) -> None:
    assert remote.server is not None
    stranger = RemotePages(remote.there.memory, remote.server.address, b"another secret, guessed")
    with pytest.raises(Lost):
        stranger.read(Space(), PAGE)
    with pytest.raises(Lost, match="did not answer lately"):  # nor is it asked again at once
        stranger.read(Space(), PAGE)
    with socket.create_connection(remote.server.address) as raw:  # does not follow the protocol
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        raw.settimeout(5)
        received = b"".join(iter(lambda: _rest(raw), b""))
        assert len(received) == 48  # a greeting and a random number
    assert remote.source.read(Space(), PAGE)


def _rest(raw: socket.socket) -> bytes:
    try:
        return raw.recv(4096)
    except ConnectionResetError:
        return b""


def test_a_server_must_know_the_secret_too(remote: Source) -> None:
    assert remote.server is not None
    with PageServerOf(remote.here, b"another secret, guessed") as other, pytest.raises(Lost):
        RemotePages(remote.there.memory, other.address, SECRET).read(Space(), PAGE)


class PageServerOf(PageServer):
    def __init__(self, one: Runner, secret: bytes) -> None:
        super().__init__(one.memory, secret)

    def __enter__(self) -> PageServerOf:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Between:
    """Passes on what client and server say. change: what becomes of the server's bytes; None ends the connection."""

    def __init__(self, server: Address, change: Callable[[int, bytes], bytes | None]) -> None:
        self.server, self.change = server, change
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        client, _ = self.listener.accept()
        with self.listener, client, socket.create_connection(self.server) as server:
            back = threading.Thread(target=self._pass, args=(client, server), daemon=True)
            back.start()
            at = 0
            with suppress(OSError):
                while (data := server.recv(1000)) and (changed := self.change(at, data)) is not None:
                    client.sendall(changed)
                    at += len(data)
            for one in (client, server):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            back.join()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1000):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("at", [10, 30, 60, 100, 300, 3000])
@pytest.mark.parametrize("ends", [False, True])
def test_a_message_that_is_changed_or_cut_is_lost(remote: Source, at: int, ends: bool) -> None:
    def change(start: int, data: bytes) -> bytes | None:
        if not start <= at < start + len(data):
            return data
        return None if ends else data[: at - start] + bytes([data[at - start] ^ 1]) + data[at - start + 1 :]

    assert remote.server is not None
    between = Between(remote.server.address, change)
    with pytest.raises(Lost):
        RemotePages(remote.there.memory, between.address, SECRET).read(Space(), PAGE)
    between.thread.join()


def test_a_server_that_ended_is_an_error_and_one_that_began_again_is_asked_again(remote: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.server is not None
    remote.source.read(Space(), PAGE)
    port = remote.server.address.port
    remote.server.close()
    with pytest.raises(Lost):
        remote.source.read(Space(), PAGE)
    with pytest.raises(Lost, match="did not answer lately"):
        remote.source.read(Space(), PAGE)
    monkeypatch.setattr("redraft.kv.remote.REST", 0.0)
    remote.server = PageServer(remote.here.memory, SECRET, port=port)
    assert remote.source.read(Space(), PAGE)
