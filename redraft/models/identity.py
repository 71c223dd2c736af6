"""What two engines must have in common so that one can read the cache of the other."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from redraft.ops import library
from redraft.ops.arrays import array, name_of

if TYPE_CHECKING:
    from redraft.models.runner import Runner

SAMPLE = 256  # numbers of an array that are compared


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


def _sample(held: Any) -> str:
    """Of the shape and of numbers in equal distances. Of a tensor in a form of oneDNN, which cannot be read, the shape only."""
    if getattr(held, "is_mkldnn", False):
        return repr(tuple(held.shape))
    flat = held.reshape(-1)
    some = np.ascontiguousarray(array(flat[:: max(1, len(flat) // SAMPLE)]))
    return repr(tuple(held.shape)) + hashlib.sha256(some.view(np.uint8).data).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
