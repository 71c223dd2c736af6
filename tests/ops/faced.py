"""The NumPy backend with tensors of PyTorch on both sides, for tests and toy methods that are written with them."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.sequence import Space
from redraft.core.spec import ModelSpec
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import I32
from redraft.ops.arrays import array, numpy_dtype
from redraft.ops.backend import Products, WeightSums
from redraft.ops.format import Array, Format
from redraft.ops.numpy_ops import NumpyOps, NumpyPlan
from redraft.ops.numpy_pool import FormatStore, NumpyPool


def tensor(x: Any) -> Any:
    """An array as a tensor with the same memory; other values unchanged."""
    if not isinstance(x, np.ndarray):
        return x
    if numpy_dtype(x.dtype).name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x if x.flags.writeable else x.copy())


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


class Faced:
    """dtype: of PyTorch; inner: the backend."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.inner, self.dtype = NumpyOps(dtype), dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def allocate(self, spec: ModelSpec, blocks: int) -> NumpyPool:
        pool = self.inner.allocate(spec, blocks)
        pool.data = tensor(pool.data)
        return pool

    def define(self, pool: NumpyPool, fmt: Format) -> int:
        arrays = {name: typed(one) for name, one in fmt.arrays.items()}
        made = Format(fmt.name, arrays, codec(fmt.codec), tuple(map(Method, fmt.sides)))
        pool.formats[fmt.name] = FormatStore(array(pool.data), made)
        return pool.formats[fmt.name].per_block

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> NumpyPlan:
        views = [view and view._replace(read=view.read and Method(view.read)) for view in batch.views]
        return self.inner.plan(replace(batch, views=views), spec, taps)

    def rope(self, x: Any, *rest: Any) -> Any:
        return tensor(self.inner.rope(array(x), *rest))

    def attend(self, index: int, layer: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return tensor(self.inner.attend(index, layer, array(q), array(k), array(v), *rest))

    def summarize(self, pool: NumpyPool, space: Space, pages: I32, read: Any) -> None:
        self.inner.summarize(pool, space, pages, Method(read))  # type: ignore[arg-type]

    def watched(self, plan: NumpyPlan) -> dict[int, WeightSums]:
        return {s: WeightSums(tensor(seen.chain), tensor(seen.nodes)) for s, seen in self.inner.watched(plan).items()}
