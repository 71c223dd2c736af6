"""The complete hardware interface. Each backend decides the layout inside a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from redraft.core.batch import Batch
from redraft.core.sequence import Space
from redraft.core.spec import Attention, Experts, Mlp, ModelSpec, Norm
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I32, I64
from redraft.ops.arrays import Tensor, array, cast, device, namespace, widened
from redraft.ops.format import Array, Arrays, Format
from redraft.ops.quantized import Quantized


class Feature(StrEnum):
    """Optional capabilities of a backend. Errors use these names."""

    PER_LAYER = "per-layer lanes"
    PER_HEAD = "per-head lanes"
    RUN = "a segment of layers, or a whole pass, in one call"
    GROUPED = "quantized weights with a scale for each group of columns, as fast as others"
    BIT_EXACT = "an output element does not depend on rows, threads or neighbours"
    KEPT = "packed weights that a file can hold"


class Linear(NamedTuple):
    """weight [out, in], bias [out] or None: numpy arrays, or those of a backend."""

    weight: Any
    bias: Any = None

    @property
    def outs(self) -> int:
        return len(self.weight)

    @property
    def meta(self) -> bool:
        """Whether the weight has a shape only, without numbers."""
        return not any(self.weight.strides) if isinstance(self.weight, np.ndarray) else bool(self.weight.is_meta)

    def rows(self, keep: NDArray[Any]) -> Linear:
        """The layer with these outputs only, unpacked."""
        dense = self.weight.to_dense() if getattr(self.weight, "is_mkldnn", False) else self.weight  # a layout, see Backend.pack
        return Linear(dense[keep], None if self.bias is None else self.bias[keep])


class PackedWeights(Protocol):
    """A linear layer in a form that only its backend can read; see Backend.pack."""

    @property
    def outs(self) -> int: ...

    @property
    def meta(self) -> bool: ...

    def rows(self, keep: NDArray[Any]) -> Linear | Quantized: ...


class LowRank(NamedTuple):
    """What is added to the outputs first..first + n of a linear layer: (x a^T) b. a: [rank, ins]; b: [rank, n], with
    the factor of the adapter. Both contiguous and in the dtype of the model; sums are in float32 (float64 in the reference)."""

    a: Any
    b: Any
    first: int


@dataclass(frozen=True)
class Adapted:
    """A linear layer with low-rank terms for some rows of the input: (i64 rows, term)."""

    base: LinearWeights
    terms: tuple[tuple[I64, LowRank], ...]

    @property
    def outs(self) -> int:
        return self.base.outs

    @property
    def meta(self) -> bool:
        return self.base.meta

    def rows(self, keep: NDArray[Any]) -> Linear | Quantized:
        """Without the terms."""
        return self.base.rows(keep)

    def product(self, x: Tensor, backend: Any) -> Tensor:
        y: Tensor = backend.linear(x, self.base)
        for rows, term in self.terms:
            backend.add_low_rank(y, x, rows, term)
        return y


LinearWeights = Linear | Quantized | PackedWeights


class NormWeights(NamedTuple):
    """weight: of norms with `above_one`, 1 + what is stored, in float32 or better."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    qkv: LinearWeights
    out: LinearWeights
    attn_norm: NormWeights | None = None
    mlp_norm: NormWeights | None = None
    attn_post_norm: NormWeights | None = None
    mlp_post_norm: NormWeights | None = None
    q_norm: NormWeights | None = None
    k_norm: NormWeights | None = None
    sink_logits: Tensor | None = None  # [heads], in float32 or better
    up: LinearWeights | None = None
    down: LinearWeights | None = None
    router: LinearWeights | None = None
    shared_up: LinearWeights | None = None
    shared_down: LinearWeights | None = None
    shared_gate: LinearWeights | None = None
    experts_up: tuple[LinearWeights, ...] = ()
    experts_down: tuple[LinearWeights, ...] = ()


@dataclass(frozen=True)
class Weights:
    """All weights of a model, on one device and in one dtype, except quantized weights."""

    embed: Tensor | PackedWeights  # PackedWeights if tied: the head, in the form of its backend
    head: LinearWeights  # over `embed` itself when tied
    final_norm: NormWeights
    layers: tuple[LayerWeights, ...]
    positions: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(x.nbytes if isinstance(x, np.ndarray) else x.numel() * x.element_size() for x in self.arrays())

    def arrays(self) -> list[Tensor]:
        """All arrays, in order, each once."""
        seen: dict[int, Any] = {}

        def walk(value: Any) -> None:
            if isinstance(value, np.ndarray):
                seen[value.ctypes.data] = value
            elif hasattr(value, "element_size"):  # a tensor; some have no address
                at = 0 if value.is_mkldnn or value.is_meta else value.data_ptr()
                seen[at or id(value)] = value
            elif is_dataclass(value):  # a layer, or a linear layer in the form of a backend
                walk(tuple(vars(value).values()))
            elif isinstance(value, tuple | dict):
                for item in value.values() if isinstance(value, dict) else value:
                    walk(item)

        walk(tuple(vars(self).values()))
        return list(seen.values())


def limited(x: Tensor, mlp: Mlp) -> Tensor:
    """x [T, 2 hidden], gates and then ups, within the limit of `mlp` and shifted. Each number depends on itself only."""
    if mlp.limit is None and not mlp.shift:
        return x
    xp, half = namespace(x), x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    if mlp.limit is not None:
        most = xp.asarray(mlp.limit, dtype=x.dtype, device=device(x))
        gate, up = xp.where(gate > most, most, gate), xp.where(up > most, most, xp.where(up < -most, -most, up))
    found: Tensor = xp.concat([gate, cast(up + mlp.shift, x.dtype)], axis=-1)
    return found


class WeightSums(NamedTuple):
    """Statistics of the attention weights of one sequence, in float32 or better, for w watches in the order of Taps.attention. In a
    lane with n committed slots, slot j < n is committed, and slot j >= n is row j - n of the tail. Lanes are padded to the longest.
    chain: [w, L, K, slots], summed over the chain rows at positions >= since, or [w, R, L, K, slots], one entry for each chain row, 0
    before `since`, if the watches ask for each; nodes: [w, N, L, K, slots], one entry for each tree row."""

    chain: Any
    nodes: Any


class ForwardResult(NamedTuple):
    """The results of a forward pass, one row for each logit row. argmax: i32[R], the lowest id of equal logits, -1 where a row holds NaN
    or +inf; top_k: i32[R, k], best first, lower ids first among equal logits; logits: [R, V] in the backend's dtype or float32; hidden:
    layer -> [T, hidden] after that layer; attention: index of a sequence in the batch -> WeightSums."""

    argmax: I32
    top_k: I32 | None = None
    logits: Tensor | None = None
    hidden: Mapping[int, Tensor] = MappingProxyType({})
    attention: Mapping[int, WeightSums] = MappingProxyType({})


def argmax(logits: Tensor) -> I32:
    """ForwardResult.argmax for rows of logits."""
    if isinstance(logits, np.ndarray):
        rows = widened(logits)
        best = rows.argmax(-1)  # a NaN counts as the largest
        return np.where(np.take_along_axis(rows, best[..., None], -1)[..., 0] < np.inf, best, -1).astype(np.int32)
    best = logits.argmax(-1, keepdim=True)
    number = logits.gather(-1, best) < float("inf")
    found: I32 = best.masked_fill(~number, -1).squeeze(-1).int().cpu().numpy()
    return found


def best_first(logits: Tensor, k: int) -> I32:
    """i32[R, k]: the ids of the k largest logits of each row, by descending value, then by ascending id. NaN is above all numbers. On a
    GPU, PyTorch chooses which of equal logits at the cut are among the k."""
    k = min(k, logits.shape[-1])
    if str(device(logits)) == "cpu":
        rows = widened(logits)
        if k * PART <= logits.shape[-1]:
            return _best_of_parts(array(rows), k)
        if isinstance(rows, np.ndarray):
            keys = np.where(np.isnan(rows), np.inf, rows)
            return np.argsort(-keys, axis=-1, kind="stable")[..., :k].astype(np.int32)
    values, ids = logits.topk(k, dim=-1)
    ids, order = ids.sort(dim=-1)
    order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    found: I32 = ids.gather(-1, order).int().cpu().numpy()
    return found


PART = 48  # logits of a part


def _best_of_parts(rows: NDArray[Any], k: int) -> I32:
    """best_first without sorting whole rows: no logit below the k-th largest maximum of parts is among the k largest."""
    whole = rows.shape[1] // PART * PART
    least = np.partition(rows[:, :whole].reshape(len(rows), PART, -1).max(1), -k)[:, -k] if len(rows) else rows[:, 0]
    found = np.empty((len(rows), k), np.int32)
    for r, (row, low) in enumerate(zip(rows, least, strict=True)):
        (ids,) = np.nonzero(~(row < low))  # NaN is kept
        values = row[ids]
        if (odd := np.isnan(values)).any():
            values = np.where(odd, np.inf, values)
        found[r] = ids[np.argsort(-values, kind="stable")[:k]]
    return found


Room = Callable[[int], NDArray[np.uint8]]
"""Memory of so many bytes, at a multiple of 64, which stays as long as the array. It may be read-only if nothing is written."""

Products = Callable[[Tensor, Tensor], Tensor]  # Backend.products


class Select(Protocol):
    """An opened sparse attention method, as used by backends. Its side data are arrays of the unit. Per-slot arrays are filled on
    write, whole arrays when a page is full and committed. K kv heads, G query heads of each, R rows, n slots."""

    def arrays(self, head_dim: int, dtype: Any) -> dict[str, Array]: ...

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        """The entries [T, K, ...] of the per-slot arrays for keys [T, K, D] of layer `index`, in the form that attention reads."""
        ...

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        """The whole arrays [m, *shape] of m units from their keys [m, 32, D]."""
        ...

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """Selects the visible keys to read: bool [K, G, R, n] or [K, 1, R, n], a subset of `seen`. q: [K, G, R, D]; held: the side data of
        the units of the lane [K, n / 32, *shape]; seen: bool [K, R, n]; where: i64 [K, n], positions of the slots; at: i64 [R],
        positions of the rows. The choice of a row must not depend on other rows. Sums over channels therefore use `products`, not a
        matrix product of PyTorch, because its rounding depends on the number of rows."""
        ...


class Backend(Protocol):
    """Rows T, features in the last dimension. `pool` and `plan` are opaque outside the backend."""

    name: str
    dtype: Any  # of NumPy or PyTorch, whichever its arrays are of
    device: Any  # as PyTorch names it
    features: frozenset[Feature]
    mixers: frozenset[type]  # the mixers that it computes, see core/spec.py

    def allocate(self, spec: ModelSpec, blocks: int, room: Room | None = None) -> Any:
        """The pool of pages: `blocks` blocks of 32 tokens, for all layers with attention and their kv heads. room: gives its memory.
        Unsupported if this backend needs memory of its own."""
        ...

    def mode(self) -> AbstractContextManager[Any]:
        """The context in which passes run one operation at a time."""
        ...

    def block_bytes(self, spec: ModelSpec) -> int:
        """The bytes of one block of the pool."""
        ...

    def define(self, pool: Any, fmt: Format) -> int:
        """Registers a page format; returns how many of its units one block holds. Raises Unsupported if that is none."""
        ...

    def zero(self, pool: Any, pages: list[tuple[Space, int]]) -> None:
        """Fills all arrays of these pages with 0. A page is given by its space and its number in that space."""
        ...

    def move(self, pool: Any, space: Space, src: I32, dst: I32, delta: int = 0) -> None:
        """Copies slots with all their per-slot arrays; all are read before any is written. A place is page * 32 + offset in pages of
        `space`. delta: the number of positions by which keys are rotated, with angles in float64 (plain pages only)."""
        ...

    def read(self, pool: Any, space: Space, pages: I32) -> Arrays:
        """Copies of all arrays of these pages of `space`, for write() into the pool of another engine with the same backend, model
        and formats."""
        ...

    def contents(self, pool: Any, space: Space, pages: I32) -> Arrays:
        """Copies of all arrays of these pages, by their names in the format."""
        ...

    def write(self, pool: Any, space: Space, pages: I32, arrays: Arrays) -> None:
        """Writes what read() returned, name -> [pages, *shape], into pages i32[n] of `space`."""
        ...

    def encode(self, pool: Any, source: Space, target: Space, src: I32, dst: I32, lanes: I32) -> None:
        """Encodes whole pages src[i] of one space into pages dst[i] of another with the codec of the target format, and copies their
        side data. lanes: of each page, layer * kv heads + head."""
        ...

    def summarize(self, pool: Any, space: Space, pages: I32, read: Select) -> None:
        """Fills the whole arrays of `read` in these full pages, from their keys in the form that attention reads."""
        ...

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> Any:
        """The device tensors of one step: rows, positions, places, masks. Raises Unsupported, with its name, for a missing feature."""
        ...

    def place(self, array: NDArray[Any]) -> Any:
        """An array of a checkpoint in the form that this backend computes with, which may share its memory."""
        ...

    def pack(self, weights: LinearWeights, gated: bool = False) -> LinearWeights:
        """The form of a weight, of numpy arrays or placed, that is fastest for `linear`. Called once at load, for one weight at a time.
        gated: the first half of the outputs are gates of the second half."""
        ...

    @property
    def layout(self) -> str:
        """Feature.KEPT: names the form of packed weights: with the same kernels, a backend of this layout can read them."""
        ...

    def kept(self, weights: LinearWeights) -> tuple[dict[str, int], dict[str, NDArray[Any]]] | None:
        """Feature.KEPT: the numbers and arrays of a packed weight, by name. None if this weight has a form that no file can hold."""
        ...

    def restored(self, numbers: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]) -> LinearWeights:
        """Feature.KEPT: the packed weight that `kept` took apart. It shares the memory of the arrays, which begin with a line of the cache
        and may be read-only. TypeError, KeyError or ValueError if they do not fit together."""
        ...

    @property
    def threads(self) -> int:
        """The number of CPU threads in use."""
        ...

    def use_threads(self, count: int) -> None:
        """Sets the number of CPU threads."""
        ...

    def draw(self, key: int, ids: I64, values: F64) -> int:
        """The same place as draw() of core/noise.py, fast for a whole vocabulary."""
        ...

    def add_low_rank(self, y: Tensor, x: Tensor, rows: I64, term: LowRank) -> None:
        """Adds a term to these rows of y [T, outs], the product of x [T, ins], and rounds."""
        ...

    def embed(self, weights: Weights, plan: Any) -> Tensor:
        """The embeddings [T, hidden] of the rows' tokens."""
        ...

    def rows(self, table: Tensor | PackedWeights, ids: I32) -> Tensor:
        """These rows [T, hidden] of Weights.embed."""
        ...

    def norm(self, x: Tensor, weights: NormWeights, norm: Norm) -> Tensor:
        """x [..., D] -> the same shape, each vector normed alone."""
        ...

    def linear(self, x: Tensor, weights: LinearWeights) -> Tensor:
        """x [T, ins] -> [T, outs]. Quantized weights give the bits that ops/quantized.py defines."""
        ...

    def logits(self, x: Tensor, head: LinearWeights) -> Tensor:
        """x [T, ins] -> [T, outs] in the dtype of ForwardResult.logits."""
        ...

    def activate(self, x: Tensor, activation: str, gated: bool) -> Tensor:
        """x [T, n] -> [T, n], or [T, n / 2] if gated: the activation of the first half times the second half."""
        ...

    def rope(self, x: Tensor, layer: Attention, plan: Any) -> Tensor:
        """x [T, heads, D], rotated by the position of each row."""
        ...

    def attend(
        self, index: int, layer: Attention, q: Tensor, k: Tensor, v: Tensor, pool: Any, plan: Any, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Writes the keys and values of this step to layer `index` of the pool, then attends: q [T, H, D] -> [T, H * D]. The pages and
        views of the batch define what each row sees. The statistics requested from plan() are added up in `plan`. sink_logits: see
        Attention; they take their share of the weights, also in statistics."""
        ...

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """a [K, R, D] times b [K, n, D] -> [K, R, n] in float32 or better. With Feature.BIT_EXACT an element depends only on its two
        vectors."""
        ...

    def run(self, first: int, last: int, h: Tensor, spec: ModelSpec, weights: Weights, pool: Any, plan: Any) -> Tensor | None:
        """Feature.RUN: runs layers first..last (exclusive), all with attention, in one call, with the same bits as models/layers.py.
        Returns None if this batch needs one operation at a time. The first segment may overwrite h, the embeddings; later segments
        must not, because their h was returned as a hidden state."""
        ...

    def forward(self, batch: Batch, spec: ModelSpec, weights: Weights, pool: Any, taps: Taps) -> ForwardResult | None:
        """Feature.RUN: a whole pass in one call, with the bits of plan, embed, run and head. Returns None if this batch, model or tap needs
        these."""
        ...

    def watched(self, plan: Any) -> Mapping[int, WeightSums]:
        """The statistics requested by the taps of `plan`, after all layers."""
        ...

    def experts(self, x: Tensor, weights: LayerWeights, experts: Experts) -> Tensor:
        """The outputs of the chosen experts times their shares, rounded and then added in ascending order of experts. Of experts with equal
        chances, the first are chosen. The shared expert is not among them."""
        ...

    def cap(self, x: Tensor, limit: float) -> Tensor:
        """limit * tanh(x / limit), of x in float32 or better."""
        ...

    def head(self, x: Tensor, weights: Weights, final: Norm, plan: Any, taps: Taps) -> ForwardResult:
        """The final norm and the vocabulary projection, for the logit rows only."""
        ...
