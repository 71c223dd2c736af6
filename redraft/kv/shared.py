"""A pool in memory that other processes of this machine can read, and the source that reads it.

The memory is an anonymous file. It has no name in a folder, it needs no room in /dev/shm, and it is gone when the last process that uses
it ends, however that ends. Another process of the same user opens it under /proc while its owner lives; what it has mapped stays.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.core.sequence import Space
from redraft.core.tree import I32
from redraft.errors import Unsupported
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.kv.parcel import Lost
from redraft.ops.format import Arrays

NAME = "redraft-pool"  # in lists of open files


class SharedMemory:
    """Unsupported where there are no anonymous files (they are Linux's)."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
            raise Unsupported("memory that processes share needs Linux")
        self.number = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self.number, 0o600)

    @property
    def path(self) -> str:
        """Where other processes open it while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.number}"

    def room(self, size: int) -> NDArray[np.uint8]:
        """The whole memory, zeros. Its size is final, so that no process that maps it can meet its end."""
        os.ftruncate(self.number, size)
        fcntl.fcntl(self.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return np.frombuffer(_large(mmap.mmap(self.number, size)), np.uint8)

    def close(self) -> None:
        """Other processes can no longer open it. What is mapped stays."""
        os.close(self.number)


class SharedPages:
    """A source (engine/parcel.py): the pool of another process, which has the same backend and model as `memory`. path: that of its
    SharedMemory, opened at the first read."""

    def __init__(self, memory: Paged | Memories, path: str) -> None:
        self.store, self.path = memory.paged.store, path
        self._pool: Any = None
        self._defined: set[str] = set()  # formats

    def read(self, space: Space, pages: I32) -> Arrays:
        if self._pool is None:
            self._open()
        store = self.store
        if space.format not in store.formats:
            raise Lost(f"pages of {space.format!r} are not in the pool")
        if space.format and space.format not in self._defined:
            store.backend.define(self._pool, store.formats[space.format])
            self._defined.add(space.format)
        try:
            return store.backend.read(self._pool, space, pages)
        except IndexError:
            raise Lost(f"{self.path} has fewer pages") from None

    def _open(self) -> None:
        number = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(number).st_size
            if not _sealed(number) or not size or size % self.store.block_bytes:
                raise Lost(f"{self.path} is not the pool of an engine with this model")
            memory = np.frombuffer(_large(mmap.mmap(number, size, prot=mmap.PROT_READ)), np.uint8)
        finally:
            os.close(number)
        self._pool = self.store.backend.allocate(self.store.spec, size // self.store.block_bytes, lambda _: memory)

    def close(self) -> None:
        self._pool = None
        self._defined.clear()


def _sealed(number: int) -> bool:
    """Whether no process can make the file shorter, which would end those that map it."""
    with suppress(OSError):
        return bool(fcntl.fcntl(number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    return False


def _large(memory: mmap.mmap) -> mmap.mmap:
    """With large pages, where the system gives them to shared memory."""
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
