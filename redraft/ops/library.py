"""Loads the shared library of the native kernels from `redraft/ops/cpu`, if it exists, and declares the types of its functions.

Importing this module loads nothing; `load` loads the library once. If `load` returns None, `why_not` says why, and another backend serves.

Environment: REDRAFT_ISA (avx2, avx512, avx512_vnni, avx512_bf16, amx) selects a lower instruction set, for tests;
OMP_NUM_THREADS limits the threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redraft.errors import InvalidInput
from redraft.ops.cpu.abi import SIZES_OF

if TYPE_CHECKING:
    from redraft.core.spec import ModelSpec

__all__ = ["PATH", "Library", "default_threads", "fingerprint", "load", "serves", "why_not"]

PATH = Path(__file__).parent / "cpu" / "_kernels.so"
PEAKS = ("float32", "bfloat16", "int8")  # in the order of peak.h
NATIVE_DTYPES = ("float32", "bfloat16")
PORTABLE_DTYPES = ("float32", "bfloat16", "float64")  # of NumPy's backend

TEXT, NUMBER, REAL, POINTER, SIZE = ctypes.c_char_p, ctypes.c_int, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, ...]] = {  # the type of the result, then those of the arguments
    "rd_isa": (TEXT,),
    "rd_sizes": (TEXT,),
    "rd_isa_compiled": (TEXT,),
    "rd_isa_detected": (TEXT,),
    "rd_isa_refused": (TEXT,),
    "rd_fill": (NUMBER, POINTER, SIZE),
    "rd_peak": (REAL, NUMBER),
    "rd_peak_instruction": (TEXT, NUMBER),
    "rd_read_bandwidth": (REAL, POINTER, SIZE, NUMBER),
    "rd_set_threads": (NUMBER, NUMBER),
    "rd_threads": (NUMBER,),
}


@dataclass(frozen=True)
class Library:
    """The loaded library. A call releases the GIL, so other Python threads run; only one call runs at a time."""

    path: Path
    c: ctypes.CDLL  # the functions themselves, for functions with structures as arguments

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._text("rd_isa")

    @property
    def isa_detected(self) -> str:
        """The best instruction set of this machine that Redraft supports."""
        return self._text("rd_isa_detected")

    @property
    def isas_compiled(self) -> tuple[str, ...]:
        """The instruction sets that the compiler supported, in ascending order."""
        return tuple(filter(None, self._text("rd_isa_compiled").split(",")))

    @property
    def threads(self) -> int:
        """The number of workers, including the calling thread."""
        return int(self.c.rd_threads())

    def set_threads(self, count: int) -> None:
        """Sets the number of workers. Call it only between other calls. Raises InvalidInput if `count` is not possible."""
        if count < 1:
            raise InvalidInput(f"threads = {count}: must be 1 or more")
        if self.c.rd_set_threads(count) != 0:
            raise InvalidInput(f"threads = {count}: the system cannot start that many")

    def fill(self, address: int, size: int) -> None:
        """Writes to every memory page of a buffer. Each worker writes to the part that it will read."""
        _checked(self.c.rd_fill(address, size), "the buffer could not be filled")

    def read_bandwidth(self, address: int, size: int, rounds: int = 1) -> float:
        """Bytes per second of the fastest pass over a buffer with all threads. The buffer must be far larger than the caches."""
        return _checked(float(self.c.rd_read_bandwidth(address, size, rounds)), "the bandwidth could not be measured")

    def peak(self, kind: str) -> float:
        """Operations per second in registers with all threads. kind: 'float32', 'bfloat16' or 'int8'; 0 without an instruction for it."""
        return _checked(float(self.c.rd_peak(PEAKS.index(kind))), "the peak could not be measured")

    def peak_instruction(self, kind: str) -> str:
        """The instruction that `peak` runs, empty if there is none for `kind`."""
        return self._text("rd_peak_instruction", PEAKS.index(kind))

    def _text(self, name: str, *arguments: int) -> str:
        return bytes(getattr(self.c, name)(*arguments) or b"").decode()


def load() -> Library | None:
    """The library, or None (see `why_not`). Raises InvalidInput if this machine or library lacks the REDRAFT_ISA requested."""
    found, _ = _load()
    return found


def why_not() -> str:
    """The reason why `load` returns None, without a full stop; empty if it returns the library."""
    _, reason = _load()
    return reason


def serves(dtype: Any, device: Any, spec: ModelSpec | None = None) -> tuple[str, str]:
    """The backend for a model with this dtype on this device, and the reason: 'native', or else 'torch', or 'numpy' where PyTorch is not
    installed and NumPy's backend has the dtype. spec: the model, if known."""
    why = _refused(dtype, device, spec)
    if not why:
        library = load()
        assert library is not None
        return "native", f"compiled kernels for {library.isa}"
    portable = str(device) == "cpu" and _name(dtype) in PORTABLE_DTYPES and importlib.util.find_spec("torch") is None
    return "numpy" if portable else "torch", why


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")  # numpy's types and PyTorch's


def _refused(dtype: Any, device: Any, spec: ModelSpec | None) -> str:
    """Why the native backend does not serve; empty if it does."""
    name, place = _name(dtype), str(device)
    if place.partition(":")[0] != "cpu":
        return f"native kernels run on the cpu, not on {place}"
    if name not in NATIVE_DTYPES:
        return f"native kernels support {' and '.join(NATIVE_DTYPES)}, not {name}"
    if spec is not None and any(layer.rotary is not None and layer.rotary.dim != layer.head_dim for layer in spec.attention):
        return "native kernels rotate whole heads only"
    if spec is not None and spec.head_dim % 2:
        return f"native kernels support even head sizes only, not {spec.head_dim}"
    if spec is not None and len({layer.heads for layer in spec.attention}) > 1:
        return "native kernels need the same number of heads in all layers"
    return why_not()


def default_threads() -> int:
    """The number of processors that this process may use, limited by OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one number for each nesting level
    return min(cores, int(first)) if first.isdecimal() and int(first) > 0 else cores


@functools.cache
def fingerprint() -> str:
    """Of the compiled kernels: other ones have other times, and perhaps another layout of weights."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest() if PATH.exists() else ""


@functools.cache
def _load() -> tuple[Library | None, str]:
    return open_library(PATH)


def open_library(path: Path) -> tuple[Library | None, str]:
    """The library and an empty reason, or None and the reason."""
    if not path.exists():
        return None, (
            f"there is no {path}: it is compiled when Redraft is installed, which needs an x86-64 processor and gcc or clang; "
            "install again with them"
        )
    try:
        c = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        return None, f"{path} does not load: {error}"
    for name, (returned, *taken) in SIGNATURES.items():
        function: Callable[..., Any] | None = getattr(c, name, None)
        if function is None:
            return None, f"{path} is older than this code, it has no {name}: install again"
        function.restype, function.argtypes = returned, taken  # type: ignore[attr-defined]
    library = Library(path, c)
    if library._text("rd_sizes") != SIZES_OF:
        return None, f"{path} was compiled from other sources than this code: install again"
    if (refused := library._text("rd_isa_refused")) and os.environ.get("REDRAFT_ISA"):  # doctor unsets it after the library read it
        raise InvalidInput(refused)
    if library.isa == "none":
        needed = (*library.isas_compiled, "a compiler that supports AVX2")[0]
        return None, f"{path} needs {needed}, but the best of this processor is {library.isa_detected}"
    library.set_threads(default_threads())
    return library, ""


def _checked(result: float, failure: str) -> float:
    if result < 0:
        raise RuntimeError(failure)
    return result
