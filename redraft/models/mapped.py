"""A file as arrays that share its pages."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENDS = 1 << 16  # bytes
CLOCKED = {"bcachefs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs"}  # file systems whose ctime is set by this system's clock
MOUNTS = Path("/proc/self/mountinfo")
SETTLED = 2.0  # seconds, the coarsest clock of a file system in use (FAT)


class Mapped:
    """A file in memory, read-only. Arrays of it may outlive this object. flags: further ones of os.open; status: what the system says about
    the file that was opened. OSError if it cannot be opened, ValueError if it is empty."""

    def __init__(self, file: Path, flags: int = 0) -> None:
        self.file = file
        with open(file, "rb", opener=lambda name, own: os.open(name, own | flags)) as opened:
            self.status = os.fstat(opened.fileno())
            self.data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: Any, shape: tuple[int, ...], at: int) -> NDArray[Any]:
        """The numbers from byte `at` on, without a copy. ValueError if the file ends before."""
        return np.frombuffer(self.data, dtype, prod(shape), at).reshape(shape)

    @property
    def state(self) -> tuple[Any, ...]:
        """What tells the content of this file from others without reading all of it: its path, its inode, its size, the times of its last
        change, and the SHA-256 of its first and last bytes.

        The time that decides is that of the inode (ctime). The system sets it whenever a file is written, renamed onto or given another
        time, and no program can choose it. So a file with other content has another state, also if its size and mtime are the same, unless
        it was changed twice within one tick of the file system's clock; `settled` rules that out. Where the file system is not one of
        CLOCKED, for example in an image, whose times are what its maker wrote, the SHA-256 is that of all bytes.
        """
        now = self.status
        if _file_system(now.st_dev) in CLOCKED:
            digest = hashlib.sha256(self.data[:ENDS] + self.data[-ENDS:])
        else:
            digest = hashlib.sha256(self.data)
            self.forget()
        return str(self.file.resolve()), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, digest.hexdigest()

    def settled(self) -> bool:
        """Whether the file is still the one that was opened, and did not change in the last seconds."""
        try:
            now = self.file.stat()
        except OSError:
            return False
        names = "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"
        same = all(getattr(now, name) == getattr(self.status, name) for name in names)
        return same and now.st_ctime < time.time() - SETTLED

    def forget(self) -> None:
        """Pages that were read no longer count as memory of this process. Arrays stay valid: their pages come back when they are read."""
        self.data.madvise(mmap.MADV_DONTNEED)


def _file_system(device: int) -> str:
    """The kind of the file system with this number, empty if the system does not say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(" - ")[2].split(" ", 1)[0] for line in lines if line.split(" ", 3)[2] == number), "")
