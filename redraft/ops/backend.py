"""The whole hardware seam. The layout inside a page is the backend's own affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from redraft.core.batch import Batch
from redraft.core.sequence import Space
from redraft.core.spec import Attention, Experts, ModelSpec, Norm
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import F64, I32, I64
from redraft.ops.format import Array, Arrays, Format
from redraft.ops.quantized import Quantized

if TYPE_CHECKING:  # the cards of methods are read without loading it
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


class Feature(StrEnum):
    """What a backend can do beyond the base; asked for by name and refused by name."""

    PER_LAYER = "per-layer lanes"
    PER_HEAD = "per-head lanes"
    RUN = "a segment of layers in one call"
    BIT_EXACT = "an output element does not depend on rows, threads or neighbours"


class Linear(NamedTuple):
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def outs(self) -> int:
        return len(self.weight)

    @property
    def meta(self) -> bool:
        """Shapes without numbers."""
        return self.weight.is_meta

    def rows(self, keep: NDArray[Any]) -> Linear:
        """Only these outputs, unpacked."""
        dense = self.weight.to_dense() if self.weight.is_mkldnn else self.weight  # a backend's own layout, see Backend.pack
        return Linear(dense[keep], None if self.bias is None else self.bias[keep])


class Stored(Protocol):
    """A linear layer in a form that only its backend reads; see Backend.pack."""

    @property
    def outs(self) -> int: ...

    @property
    def meta(self) -> bool: ...

    def rows(self, keep: NDArray[Any]) -> Linear | Quantized: ...


LinearWeights = Linear | Quantized | Stored


class NormWeights(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    attn_norm: NormWeights
    qkv: LinearWeights
    out: LinearWeights
    mlp_norm: NormWeights
    q_norm: NormWeights | None = None
    k_norm: NormWeights | None = None
    up: LinearWeights | None = None
    down: LinearWeights | None = None
    router: LinearWeights | None = None
    experts_up: tuple[LinearWeights, ...] = ()
    experts_down: tuple[LinearWeights, ...] = ()


@dataclass(frozen=True)
class Weights:
    """All of a model's numbers, on one device, in one dtype but for quantized ones."""

    embed: Tensor | Stored  # Stored: the head, which it is tied to, in its backend's form
    head: LinearWeights  # over `embed` itself when tied
    final_norm: NormWeights
    layers: tuple[LayerWeights, ...]
    positions: Tensor | None = None

    @property
    def bytes(self) -> int:
        from torch import Tensor

        seen: dict[int, int] = {}

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                seen[id(value)] = value.numel() * value.element_size()
            elif is_dataclass(value):  # a layer, or a linear layer as a backend holds it
                walk(tuple(vars(value).values()))
            elif isinstance(value, tuple | dict):
                for item in value.values() if isinstance(value, dict) else value:
                    walk(item)

        walk(tuple(vars(self).values()))
        return sum(seen.values())


class Seen(NamedTuple):
    """Statistics of one sequence's attention weights in float32 or better, w watches in the order of Taps.attention. Slot j
    of a lane with n committed slots: committed where j < n, else row j - n of the sequence's tail; lanes are padded to the
    longest. chain: [w, L, K, slots], summed over the chain rows at positions >= since; nodes: [w, N, L, K, slots], of each
    tree row by itself."""

    chain: Tensor
    nodes: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a forward pass returns, one row a logit row. argmax: i32[R], lowest id wins ties, -1 where a row holds NaN or +inf; top_k:
    i32[R, k], best first, ties by id; logits: [R, V] in the backend's dtype or float32; hidden: layer -> [T, hidden] after that layer;
    attention: place of a sequence in the batch -> Seen."""

    argmax: I32
    top_k: I32 | None = None
    logits: Tensor | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Seen] = field(default_factory=dict)


def argmax(logits: Tensor) -> I32:
    """Outputs.argmax of rows of logits."""
    best = logits.argmax(-1, keepdim=True)  # a NaN counts as the largest
    number = logits.gather(-1, best) < float("inf")
    found: I32 = best.masked_fill(~number, -1).squeeze(-1).int().cpu().numpy()
    return found


def best_first(logits: Tensor, k: int) -> I32:
    """i32[R, k]: ids of the k largest logits of each row, by value descending, then id ascending; which of several
    equal ones at the cut are among them is PyTorch's choice."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    ids, order = ids.sort(dim=-1)
    order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order).int().cpu().numpy()


Products = Callable[["Tensor", "Tensor"], "Tensor"]  # Backend.products


class Select(Protocol):
    """An opened method that reads sparsely, as attention meets it. Its side data are arrays of the unit, filled on write (one
    entry a slot) or when a page is full and committed (whole arrays). K kv heads, G query heads of each, R rows, n slots."""

    def arrays(self, head_dim: int, dtype: torch.dtype) -> dict[str, Array]: ...

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        """Entries [T, K, ...] of the per-slot arrays for keys [T, K, D] of layer `index`, as attention reads them."""
        ...

    def fold(self, keys: Tensor) -> dict[str, Tensor]:
        """The whole arrays [m, *shape] of m units from their keys [m, 32, D]."""
        ...

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """Which of the visible keys are read. q [K, G, R, D]; held: its side data of the lane's units [K, n / 32, *shape]; seen:
        bool [K, R, n]; where: i64 [K, n], positions of the slots; at: i64 [R], positions of the rows -> bool [K, G, R, n] or
        [K, 1, R, n], a subset of seen. A row's choice must not depend on the other rows: sums over channels are made by `products`,
        never by a matrix product of PyTorch's, whose rounding depends on their number."""
        ...


class Backend(Protocol):
    """Rows T, features in the last dimension. `pool` and `plan` are opaque outside the backend."""

    name: str
    dtype: torch.dtype
    device: torch.device
    features: frozenset[Feature]
    mixers: frozenset[type]  # the kinds of layers that it computes, see core/spec.py

    def allocate(self, spec: ModelSpec, blocks: int) -> Any:
        """The pool of pages: `blocks` times 32 tokens of all layers with attention and their kv heads."""
        ...

    def block_bytes(self, spec: ModelSpec) -> int: ...

    def define(self, pool: Any, fmt: Format) -> int:
        """Pages of this format may follow; returns how many units of it one block holds. Unsupported where it holds none."""
        ...

    def zero(self, pool: Any, pages: list[tuple[Space, int]]) -> None: ...

    def move(self, pool: Any, space: Space, src: I32, dst: I32, delta: int = 0) -> None:
        """Copies slots with all their per-slot arrays, all gathered and then scattered. A place is page * 32 + offset in pages of
        `space`. delta: keys are turned by so many positions on the way, angles in float64 (plain pages only)."""
        ...

    def read(self, pool: Any, space: Space, pages: I32) -> Arrays:
        """Copies of all arrays of these pages of `space`, for write() into the pool of another engine with the same backend, model
        and formats."""
        ...

    def write(self, pool: Any, space: Space, pages: I32, arrays: Arrays) -> None: ...

    def encode(self, pool: Any, source: Space, target: Space, src: I32, dst: I32) -> None:
        """Whole pages src[i] of one space into dst[i] of another, by the target format's codec; side data go with them."""
        ...

    def fold(self, pool: Any, space: Space, pages: I32, read: Select) -> None:
        """Fills the whole arrays of `read` in these pages, which are full, from their keys as attention reads them."""
        ...

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NOTHING) -> Any:
        """Device tensors of one step: rows, positions, places, masks. Unsupported by name where a feature lacks."""
        ...

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        """The form of a weight that `linear` likes best; called once at load, on one weight at a time. gated: its first half of the
        outputs are gates of the other half."""
        ...

    @property
    def threads(self) -> int:
        """How many of the CPU work for it."""
        ...

    def use_threads(self, count: int) -> None:
        """How many of the CPU work for it from now on."""
        ...

    def gumbel(self, key: int, ids: I64) -> F64:
        """core/noise.py's, bit for bit; for a whole vocabulary."""
        ...

    def embed(self, weights: Weights, plan: Any) -> Tensor: ...

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor: ...

    def linear(self, x: Tensor, weights: LinearWeights) -> Tensor:
        """x [T, ins] -> [T, outs]. With quantized weights bit for bit as ops/quantized.py defines it."""
        ...

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor: ...

    def rope(self, x: Tensor, layer: Attention, plan: Any) -> Tensor:
        """x [T, heads, D] turned by each row's position."""
        ...

    def attend(self, index: int, layer: Attention, q: Tensor, k: Tensor, v: Tensor, pool: Any, plan: Any) -> Tensor:
        """Writes this step's keys and values of layer `index` of the pool, then reads: q [T, H, D] -> [T, H * D]. The batch's pages
        and views say what each row sees; statistics that `plan` was asked for are added up in it."""
        ...

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """a [K, R, D] times b [K, n, D] -> [K, R, n] in float32 or better. With Feature.BIT_EXACT an element depends on its own two
        vectors only."""
        ...

    def run(self, first: int, last: int, h: Tensor, spec: ModelSpec, weights: Weights, pool: Any, plan: Any) -> Tensor | None:
        """Feature.RUN: what models/layers.py does for layers first..last (exclusive), all with attention, in one call, bit for
        bit; None where this batch needs one operation at a time. The first segment may write over h, the embeddings; what others
        start from was handed out."""
        ...

    def watched(self, plan: Any) -> Mapping[int, Seen]:
        """The statistics that the taps of `plan` asked for, after all layers."""
        ...

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        """The chosen experts' outputs times their shares, rounded and then added by ascending expert."""
        ...

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: Any, taps: Taps) -> Outputs:
        """Final norm and vocabulary projection of the logit rows only."""
        ...
