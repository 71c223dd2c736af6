"""The limits of the machine: bytes read from memory a second, floating-point operations a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from redraft.bench.peers.peer import Job
from redraft.models import memory
from redraft.ops import library, pytorch
from redraft.ops.arrays import Numbers

BUFFER = 2 << 30  # bytes; the last-level cache of some machines holds hundreds of MiB
SIDE = 2048  # rows of the square matrices that are multiplied to measure the peak
KINDS = "float32", "bfloat16"


class Limits:
    """Measured in turns with the engines. Options, for tests: `bytes` of the buffer, `side` of the matrices."""

    does = ("bandwidth", "peak")

    def __init__(self, job: Job) -> None:
        use_threads(job.threads)
        self.buffer = buffer(job.options.get("bytes"))
        self.side = int(job.options.get("side", SIDE))
        self.facts: dict[str, Any] = {"buffer_bytes": self.buffer.nbytes, **how()}

    def bandwidth(self) -> dict[str, Any]:
        return {"bytes_per_second": bandwidth(self.buffer)}

    def peak(self) -> dict[str, Any]:
        return {"flops_per_second": peaks(self.side)}


def limits(size: int | None = None, side: int = SIDE) -> dict[str, Any]:
    """Both limits of this machine. Takes seconds."""
    return {"bytes_per_second": bandwidth(buffer(size)), "flops_per_second": peaks(side), **how()}


def how() -> dict[str, str | None]:
    """Measures with the native kernels if they are compiled, else with NumPy."""
    native = library.load()
    return {"how": "NumPy" if native is None else "the native kernels", "isa": None if native is None else native.isa}


def use_threads(count: int) -> None:
    pytorch.use_threads(count)
    if (native := library.load()) is not None:
        native.set_threads(count)


def buffer(size: int | None = None) -> Numbers:
    """A buffer of 2 GiB, or of a quarter of the free memory if that is less. All its pages are resident."""
    held = np.empty((size or min(BUFFER, memory.limits() // 4)) // 8, np.int64)
    if (native := library.load()) is not None:
        native.fill(held.ctypes.data, held.nbytes)
    else:
        held.fill(1)
    return held


def bandwidth(held: Numbers, repeats: int = 4) -> float:
    """Bytes a second that all threads together read from the buffer; the best of several passes."""
    if (native := library.load()) is not None:
        return native.read_bandwidth(held.ctypes.data, held.nbytes, repeats)
    threads = library.default_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(held, threads)
        return held.nbytes / _best(lambda: list(pool.map(np.sum, parts)), repeats)


def peaks(side: int = SIDE) -> dict[str, float]:
    """Operations a second by number format: of native kernels in registers, else the best of several large matrix products of NumPy.
    Formats without an instruction on this machine, or in NumPy, are left out."""
    if (native := library.load()) is not None:
        found = {kind: native.peak(kind) for kind in (*KINDS, "int8")}
        return {kind: flops for kind, flops in found.items() if flops}
    matrix = np.ones((side, side), np.float32)
    return {"float32": 2 * side**3 / _best(lambda: matrix @ matrix, 5)}  # one more, because the first is slower


def least_seconds(size: float, flops: float, bandwidth: float, peaks: Mapping[str, float], kind: str) -> float:
    """What reading `size` bytes and computing `flops` operations in the number format `kind` takes at least: the larger of the two."""
    return max(size / bandwidth, flops / peak_of(peaks, kind))


def peak_of(peaks: Mapping[str, float], kind: str) -> float:
    """Operations a second in this number format, which is computed in float32 if this machine has no instruction for it."""
    return peaks.get(kind) or peaks["float32"]


def _best(run: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)
