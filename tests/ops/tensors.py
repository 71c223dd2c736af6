"""A backend of NumPy's arrays with tensors of PyTorch on both sides, for tests that compare backends."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.spec import ModelSpec
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import I32
from redraft.ops.arrays import array, numpy_dtype
from redraft.ops.backend import ForwardResult, LayerWeights, Linear, LowRank, NormWeights, Products, Room, Weights, WeightSums
from redraft.ops.format import Array, Format
from redraft.ops.native import NativeOps
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.numpy_pool import NumpyPool
from redraft.ops.quantized import Quantized
from redraft.ops.torch_arrays import as_tensor

CALLS = (
    "add_low_rank", "activate", "attend", "cap", "embed", "experts", "forward", "head", "linear", "norm", "pack", "place", "products",
    "rope", "run",
)  # fmt: skip


def tensor(x: Any) -> Any:
    """An array as a tensor with the same memory; other values unchanged."""
    return as_tensor(x) if isinstance(x, np.ndarray) and x.ndim else x


def both(found: Any, change: Any) -> Any:
    """The result of a method, with its arrays or tensors changed."""
    if isinstance(found, dict):
        return {name: both(x, change) for name, x in found.items()}
    if isinstance(found, tuple):
        return tuple(both(x, change) for x in found)
    return change(found)


class Method:
    """A codec or sparse read whose methods get tensors and give arrays."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found
        return lambda *args: both(found(*(both(arg, tensor) if isinstance(arg, dict) else tensor(arg) for arg in args)), array)

    def arrays(self, head_dim: int, dtype: Any) -> dict[str, Array]:
        return {name: typed(one) for name, one in self.inner.arrays(head_dim, torch.float32).items()}

    def select(self, index: int, q: Any, held: Any, seen: Any, where: Any, at: Any, products: Products) -> Any:
        def turned(a: Tensor, b: Tensor) -> Tensor:
            return torch.as_tensor(products(array(a), array(b)))  # type: ignore[arg-type]

        return array(self.inner.select(index, *(tensor(x) for x in (q,)), both(held, tensor), *map(tensor, (seen, where, at)), turned))


def typed(one: Array) -> Array:
    return one._replace(dtype=numpy_dtype(one.dtype))


def codec(inner: Any) -> Any:
    """A shipped codec for arrays, or a toy that gets tensors."""
    if inner is None or not hasattr(inner, "layout"):
        return inner and Method(inner)
    made = copy(inner)
    made.dtype = numpy_dtype(inner.dtype)
    return made


def arrays(given: Any) -> Any:
    """The same with arrays in place of tensors."""
    if isinstance(given, torch.Tensor):
        return array(given)
    if isinstance(given, Quantized):
        return replace(given, dtype=numpy_dtype(given.dtype), **{name: array(part) for name, part in given.arrays.items()})
    if isinstance(given, LayerWeights | Weights):
        return type(given)(**{field.name: arrays(getattr(given, field.name)) for field in fields(given)})
    if isinstance(given, Linear | NormWeights | LowRank):
        return type(given)(*map(arrays, given))
    return tuple(map(arrays, given)) if type(given) is tuple else given


def tensors(found: Any) -> Any:
    """The same with tensors in place of arrays of numbers."""
    if isinstance(found, ForwardResult):
        hidden = {i: tensors(rows) for i, rows in found.hidden.items()}
        seen = {s: WeightSums(tensors(one.chain), tensors(one.nodes)) for s, one in found.attention.items()}
        return found._replace(logits=tensors(found.logits), hidden=hidden, attention=seen)
    if isinstance(found, Linear):
        return Linear(*map(tensors, found))
    if isinstance(found, Quantized):
        return replace(found, dtype=getattr(torch, str(found.dtype)), **{name: as_tensor(part) for name, part in found.arrays.items()})
    return tensor(found)


class Tensors:
    """dtype: of PyTorch. Weights keep their arrays as long as they live, because the backend knows them by identity."""

    kind: type = NativeOps

    def __init__(self, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> None:
        self.inner = self.kind(dtype, device)
        self.dtype, self.device = dtype, torch.device("cpu")
        self._held: dict[int, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def arrays(self, given: Any) -> Any:
        if not isinstance(given, Weights | LayerWeights):
            return arrays(given)
        if id(given) not in self._held:
            self._held[id(given)] = given, arrays(given)
        return self._held[id(given)][1]

    def define(self, pool: NumpyPool, fmt: Format) -> int:
        made = {name: typed(one) for name, one in fmt.arrays.items()}
        found: int = self.inner.define(pool, Format(fmt.name, made, codec(fmt.codec), tuple(map(Method, fmt.sides))))
        return found

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> Any:
        views = [view and view._replace(read=view.read and Method(view.read)) for view in batch.views]
        return self.inner.plan(replace(batch, views=views), spec, taps)

    def summarize(self, pool: Any, space: Any, pages: I32, read: Any) -> None:
        self.inner.summarize(pool, space, pages, Method(read))

    def write(self, pool: Any, space: Any, pages: I32, given: Any) -> None:
        self.inner.write(pool, space, pages, both(given, array))

    def watched(self, plan: Any) -> Mapping[int, WeightSums]:
        return {s: WeightSums(tensors(seen.chain), tensors(seen.nodes)) for s, seen in self.inner.watched(plan).items()}


def _call(name: str) -> Any:
    def call(self: Tensors, *given: Any) -> Any:
        return tensors(getattr(self.inner, name)(*map(self.arrays, given)))

    return call


for _name in CALLS:
    setattr(Tensors, _name, _call(_name))


class Faced(Tensors):
    """NumPy's backend. The memory of its pools is a tensor too."""

    kind = NumpyOps

    def allocate(self, spec: ModelSpec, blocks: int, room: Room | None = None) -> NumpyPool:
        pool: NumpyPool = self.inner.allocate(spec, blocks, room)
        pool.data = tensor(pool.data)
        return pool

    def define(self, pool: NumpyPool, fmt: Format) -> int:
        return super().define(replace(pool, data=array(pool.data)), fmt)  # with the same formats
