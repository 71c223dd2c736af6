"""The native kernels, if they are there: finds the shared library beside `redraft/ops/cpu` and gives its functions types.

Importing this module loads nothing; `load` does, once. Where it gives None, `why_not` says what is missing and PyTorch serves.

Environment: REDRAFT_ISA (avx2, avx512, avx512_bf16, amx) lowers the instruction set, for testing; OMP_NUM_THREADS caps the threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redraft.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from redraft.core.spec import ModelSpec

__all__ = ["PATH", "Library", "default_threads", "load", "serves", "why_not"]

PATH = Path(__file__).parent / "cpu" / "_kernels.so"
PEAKS = ("float32", "bfloat16", "int8")  # in the order of their numbers in peak.h
NATIVE_DTYPES = ("float32", "bfloat16")

TEXT, NUMBER, REAL, POINTER, SIZE = ctypes.c_char_p, ctypes.c_int, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, ...]] = {  # what it returns, then what it takes
    "rd_isa": (TEXT,),
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
    """The loaded library. A call lets other Python threads run; only one call is at work at a time."""

    path: Path
    c: ctypes.CDLL  # the functions themselves, for those whose arguments are structures

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._text("rd_isa")

    @property
    def isa_detected(self) -> str:
        """The best instruction set of this machine that Redraft knows of."""
        return self._text("rd_isa_detected")

    @property
    def isas_compiled(self) -> tuple[str, ...]:
        """The instruction sets that the compiler knew, in rising order."""
        return tuple(filter(None, self._text("rd_isa_compiled").split(",")))

    @property
    def threads(self) -> int:
        """Workers, the calling thread included."""
        return int(self.c.rd_threads())

    def set_threads(self, count: int) -> None:
        """Between calls only."""
        if count < 1:
            raise InvalidInput(f"threads = {count}: at least 1 is needed")
        if self.c.rd_set_threads(count) != 0:
            raise InvalidInput(f"threads = {count}: the system does not start that many")

    def fill(self, address: int, size: int) -> None:
        """Writes to every page of a buffer, each worker to the part that it will read."""
        _checked(self.c.rd_fill(address, size), "the buffer could not be filled")

    def read_bandwidth(self, address: int, size: int, rounds: int = 1) -> float:
        """Bytes a second of the fastest pass over a buffer, all threads reading. It must be far larger than the caches."""
        return _checked(float(self.c.rd_read_bandwidth(address, size, rounds)), "the bandwidth could not be measured")

    def peak(self, kind: str) -> float:
        """Operations a second in registers, all threads: 'float32', 'bfloat16' or 'int8'; 0 without an instruction for them."""
        return _checked(float(self.c.rd_peak(PEAKS.index(kind))), "the peak could not be measured")

    def peak_instruction(self, kind: str) -> str:
        """What `peak` runs; empty without an instruction for such numbers."""
        return self._text("rd_peak_instruction", PEAKS.index(kind))

    def _text(self, name: str, *arguments: int) -> str:
        return bytes(getattr(self.c, name)(*arguments) or b"").decode()


def load() -> Library | None:
    """The library, or None (see `why_not`). InvalidInput where REDRAFT_ISA asks for what this machine or library lacks."""
    found, _ = _load()
    return found


def why_not() -> str:
    """Why `load` gives None, in words that end no sentence; empty where it gives the library."""
    _, reason = _load()
    return reason


def serves(dtype: str | torch.dtype, device: str | torch.device, spec: ModelSpec | None = None) -> tuple[str, str]:
    """Which backend serves a model of this dtype on this device, 'native' or 'torch', and why. spec: the model, where it is known."""
    name, place = str(dtype).removeprefix("torch."), str(device)
    if place.partition(":")[0] != "cpu":
        return "torch", f"native kernels run on the cpu, not on {place}"
    if name not in NATIVE_DTYPES:
        return "torch", f"native kernels know {' and '.join(NATIVE_DTYPES)}, not {name}"
    if spec is not None and any(layer.rotary is not None and layer.rotary.dim != layer.head_dim for layer in spec.attention):
        return "torch", "native kernels turn whole heads only"
    if spec is not None and spec.head_dim % 2:
        return "torch", f"native kernels know even head sizes, not {spec.head_dim}"
    if spec is not None and len({layer.heads for layer in spec.attention}) > 1:
        return "torch", "native kernels run no layers of different numbers of heads"
    library = load()
    if library is None:
        return "torch", why_not()
    return "native", f"compiled kernels for {library.isa}"


def default_threads() -> int:
    """As many as this process may use processors, no more than OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is one number a nesting level
    return min(cores, int(first)) if first.isdecimal() and int(first) > 0 else cores


@functools.cache
def _load() -> tuple[Library | None, str]:
    return open_library(PATH)


def open_library(path: Path) -> tuple[Library | None, str]:
    """A library and no reason, or None and why."""
    if not path.exists():
        return None, (
            f"there is no {path}: it is compiled when Redraft is installed, which takes an x86-64 processor and gcc or clang; "
            "install again where they are present"
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
    if (refused := library._text("rd_isa_refused")) and os.environ.get("REDRAFT_ISA"):  # doctor takes it away, the library read it once
        raise InvalidInput(refused)
    if library.isa == "none":
        needed = (*library.isas_compiled, "a compiler that knows AVX2")[0]
        return None, f"{path} needs {needed}, and the best that this processor has is {library.isa_detected}"
    library.set_threads(default_threads())
    return library, ""


def _checked(result: float, failure: str) -> float:
    if result < 0:
        raise RuntimeError(failure)
    return result
