"""A backend of NumPy's arrays with tensors of PyTorch on both sides, for tests that compare backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from redraft.core.batch import Batch
from redraft.core.spec import ModelSpec
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import I32
from redraft.ops.arrays import array, numpy_dtype
from redraft.ops.backend import ForwardResult, LayerWeights, Linear, LowRank, NormWeights, Weights, WeightSums
from redraft.ops.format import Format
from redraft.ops.native import NativeOps
from redraft.ops.quantized import Quantized
from redraft.ops.torch_arrays import as_tensor
from tests.ops.faced import Method, codec, typed

CALLS = (
    "add_low_rank", "activate", "attend", "cap", "embed", "experts", "forward", "head", "linear", "norm", "pack", "place", "products",
    "rope", "run",
)  # fmt: skip


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
    return as_tensor(found) if isinstance(found, np.ndarray) else found


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

    def define(self, pool: Any, fmt: Format) -> int:
        made = {name: typed(one) for name, one in fmt.arrays.items()}
        found: int = self.inner.define(pool, Format(fmt.name, made, codec(fmt.codec), tuple(map(Method, fmt.sides))))
        return found

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> Any:
        views = [view and view._replace(read=view.read and Method(view.read)) for view in batch.views]
        return self.inner.plan(replace(batch, views=views), spec, taps)

    def summarize(self, pool: Any, space: Any, pages: I32, read: Any) -> None:
        self.inner.summarize(pool, space, pages, Method(read))

    def watched(self, plan: Any) -> Mapping[int, WeightSums]:
        return {s: WeightSums(tensors(seen.chain), tensors(seen.nodes)) for s, seen in self.inner.watched(plan).items()}


def _call(name: str) -> Any:
    def call(self: Tensors, *given: Any) -> Any:
        return tensors(getattr(self.inner, name)(*map(self.arrays, given)))

    return call


for _name in CALLS:
    setattr(Tensors, _name, _call(_name))
assert is_dataclass(Weights)
