"""What two engines must have in common so that one can read the cache of the other."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from redraft.ops import library
from redraft.ops.arrays import array, name_of

if TYPE_CHECKING:
    from redraft.models.runner import Runner

SAMPLE = 256  # numbers of an array that are compared
PROCESSOR = Path("/proc/cpuinfo")


def form(runner: Runner) -> dict[str, str]:
    """Each part by its name: what decides the bits of keys and values, and how they lie in pages."""
    backend = runner.backend
    kernels = library.fingerprint() if backend.name == "native" else version("torch" if hasattr(backend.dtype, "is_signed") else "numpy")
    return {
        "model": _digest(repr(runner.spec)),
        "dtype": name_of(backend.dtype),
        "quantization": repr(runner.quant),
        "backend": _digest(backend.name, getattr(backend, "layout", ""), kernels),
        "weights": _digest(*map(_sample, runner.weights.arrays())),
    }


def whole_form(runner: Runner) -> dict[str, str]:
    """The form with all bits of all weights, the code, the device and the processor: what pages that outlive the process depend on. Takes
    about a second for 1.5 GB of weights."""
    backend, digest = runner.backend, hashlib.sha256()
    for held in runner.weights.arrays():
        flat = array(held.to_dense() if getattr(held, "is_mkldnn", False) else held)
        digest.update(repr((flat.shape, flat.dtype.name)).encode())
        digest.update(np.ascontiguousarray(flat).reshape(-1).view(np.uint8).data)
    isa = "" if (found := library.load()) is None else found.isa
    return {**form(runner), "weights": digest.hexdigest(), "code": code(), "device": f"{backend.device} {_processor()} {isa}"}


@cache
def code() -> str:
    """Of the modules that read, quantize, pack and compute, and of the libraries that they use."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for part in ("models", "ops", "weights"):
        for file in sorted((package / part).rglob("*.py")):
            digest.update(file.read_bytes())
    return repr((digest.hexdigest(), np.__version__, ml_dtypes.__version__, version("gguf")))


def _processor() -> str:
    """The libraries of arrays choose their code by it."""
    try:
        return next((line.partition(":")[2].strip() for line in PROCESSOR.read_text().splitlines() if line.startswith("model name")), "")
    except OSError:
        return ""


def _sample(held: Any) -> str:
    """Of the shape and of numbers in equal distances. Of a tensor in a form of oneDNN, which cannot be read, the shape only."""
    if getattr(held, "is_mkldnn", False):
        return repr(tuple(held.shape))
    flat = held.reshape(-1)
    some = np.ascontiguousarray(array(flat[:: max(1, len(flat) // SAMPLE)]))
    return repr(tuple(held.shape)) + hashlib.sha256(some.view(np.uint8).data).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
