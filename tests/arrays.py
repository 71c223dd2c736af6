"""Weights of tests: as tensors of PyTorch for comparisons, and as the numpy arrays that readers and quantizers have. PyTorch is imported
only where tensors are asked for."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redraft.ops.arrays import DTYPES, array, name_of
from redraft.ops.backend import Feature, Linear, LinearWeights
from redraft.ops.quantized import Quantized
from redraft.weights import int4, quant

if TYPE_CHECKING:
    import torch

BACKEND, DEFINITION = ("torch", "reference") if find_spec("torch") else ("numpy", "numpy")
"""The backend of tests of other parts, and the one that tells what is right, in float64."""

QUICK = "numpy"
"""The backend of tests of other parts that step through many short texts of a tiny model: it does the least beside the arithmetic."""


def placed(backend: Any, weights: Any) -> Any:
    """Weights with each array where the backend computes."""
    if isinstance(weights, np.ndarray):
        return backend.place(weights)
    if isinstance(weights, tuple):
        made = [placed(backend, one) for one in weights]
        return type(weights)(*made) if hasattr(weights, "_fields") else tuple(made)
    if not is_dataclass(weights) or isinstance(weights, type):
        return weights
    return replace(weights, **{one.name: placed(backend, getattr(weights, one.name)) for one in fields(weights)})


class Placed:
    """The part of a backend that loading uses: tensors of PyTorch, unpacked."""

    features: frozenset[Feature] = frozenset()

    def place(self, array: Any) -> torch.Tensor:
        return _tensors().as_tensor(array)

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        return _tensors().as_tensors(weights)


PLACED: Any = Placed()


class Arrays(Placed):
    """The same with NumPy's arrays, as they are."""

    def place(self, array: Any) -> Any:
        return array

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        return weights


ARRAYS: Any = Arrays()


def _tensors() -> Any:
    from redraft.ops import torch_arrays

    return torch_arrays


def numbers(given: torch.Tensor) -> NDArray[Any]:
    """The same numbers, in memory of their own."""
    return array(given).copy()


def numpy_form(weights: LinearWeights) -> Any:
    """A linear layer of tensors as numpy arrays."""
    if isinstance(weights, Quantized):
        arrays: Any = {name: numbers(array) for name, array in weights.arrays.items()}
        return replace(weights, dtype=DTYPES[name_of(weights.dtype)], **arrays)
    assert isinstance(weights, Linear)
    return Linear(numbers(weights.weight), None if weights.bias is None else numbers(weights.bias))


def quantize(method: Any, weights: Linear, role: Any = "layer", gains: torch.Tensor | None = None) -> Any:
    """What a quantizer makes of a weight of tensors, as tensors; `weights` itself if it leaves the weight as it is."""
    given = numpy_form(weights)
    found = method.quantize(given, role, None if gains is None else numbers(gains))
    return weights if found is given else _tensors().as_tensors(found)


def by_output(weights: Linear, columns: torch.Tensor | None = None) -> Any:
    """weights/quant.py's, of tensors."""
    return _tensors().as_tensors(quant.by_output(numpy_form(weights), None if columns is None else numbers(columns)))


def by_group(weights: Linear, group: int) -> Any:
    """weights/int4.py's, of tensors."""
    return _tensors().as_tensors(int4.by_group(numpy_form(weights), group))


def same(one: Quantized, other: Quantized) -> bool:
    """Whether two quantized weights of tensors have the same numbers."""
    import torch

    return one.arrays.keys() == other.arrays.keys() and all(torch.equal(array, other.arrays[name]) for name, array in one.arrays.items())
