"""The whole hardware seam. The layout inside a page is the backend's own affair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.sequence import Lanes
from redraft.core.taps import Taps
from redraft.core.tree import I32
from redraft.models.spec import Experts, LayerSpec, ModelSpec, Norm


class Feature(StrEnum):
    """What a backend can do beyond the base; asked for by name and refused by name."""

    PER_LAYER = "per-layer lanes"
    PER_HEAD = "per-head lanes"
    BIT_EXACT = "an output element does not depend on rows, threads or neighbours"


class Linear(NamedTuple):
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class NormWeights(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    attn_norm: NormWeights
    qkv: Linear
    out: Linear
    mlp_norm: NormWeights
    q_norm: NormWeights | None = None
    k_norm: NormWeights | None = None
    up: Linear | None = None
    down: Linear | None = None
    router: Linear | None = None
    experts_up: Tensor | None = None  # [E, 2 I or I, hidden]
    experts_down: Tensor | None = None  # [E, hidden, I]


@dataclass(frozen=True)
class Weights:
    """All of a model's numbers, on one device, in one dtype."""

    embed: Tensor
    head: Linear  # over `embed` itself when tied
    final_norm: NormWeights
    layers: tuple[LayerWeights, ...]
    positions: Tensor | None = None

    @property
    def bytes(self) -> int:
        seen: dict[int, int] = {}

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                seen[id(value)] = value.numel() * value.element_size()
            elif isinstance(value, LayerWeights):
                walk(tuple(vars(value).values()))
            elif isinstance(value, tuple):
                for item in value:
                    walk(item)

        walk(tuple(vars(self).values()))
        return sum(seen.values())


@dataclass(frozen=True)
class Outputs:
    """What a forward pass returns, one row a logit row. argmax: i32[R], lowest id wins ties; top_k: i32[R, k], best
    first, ties by id; logits: [R, V] in the backend's dtype; hidden: layer -> [T, hidden] after that layer."""

    argmax: I32
    top_k: I32 | None = None
    logits: Tensor | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


def best_first(logits: Tensor, k: int) -> I32:
    """i32[R, k]: ids of the k largest logits of each row, by value descending, then id ascending; which of several
    equal ones at the cut are among them is PyTorch's choice."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    ids, order = ids.sort(dim=-1)
    order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order).int().cpu().numpy()


class Backend(Protocol):
    """Rows T, features in the last dimension. `pool` and `plan` are opaque outside the backend."""

    name: str
    dtype: torch.dtype
    device: torch.device
    features: frozenset[Feature]

    def allocate(self, spec: ModelSpec, slabs: int) -> Any:
        """The pool: `slabs` times 32 tokens of all layers and kv heads."""
        ...

    def slab_bytes(self, spec: ModelSpec) -> int: ...

    def zero(self, pool: Any, pages: list[tuple[Lanes, int]]) -> None: ...

    def move(self, pool: Any, kind: Lanes, src: I32, dst: I32) -> None:
        """Copies slots, all gathered and then scattered. A place is page * 32 + offset in units of `kind`."""
        ...

    def plan(self, batch: Batch, spec: ModelSpec) -> Any:
        """Device tensors of one step: rows, positions, places, masks. Unsupported by name where a feature lacks."""
        ...

    def pack(self, weights: Linear) -> Linear:
        """The form of a weight that `linear` likes best; called once at load, on one weight at a time."""
        ...

    def embed(self, weights: Weights, plan: Any) -> Tensor: ...

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor: ...

    def linear(self, x: Tensor, weights: Linear) -> Tensor: ...

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor: ...

    def rope(self, x: Tensor, layer: LayerSpec, plan: Any) -> Tensor:
        """x [T, heads, D] turned by each row's position."""
        ...

    def attend(self, index: int, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, pool: Any, plan: Any) -> Tensor:
        """Writes this step's keys and values of layer `index`, then reads: q [T, H, D] -> [T, H * D]."""
        ...

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor: ...

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: Any, taps: Taps) -> Outputs:
        """Final norm and vocabulary projection of the logit rows only."""
        ...
