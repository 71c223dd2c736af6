"""The architecture of a decoder as data. A family file fills it from the config of a checkpoint; models/layers.py, models/mixers and
the backends interpret it.

Canonical weights by name (shapes in brackets; H heads, K kv heads, D head size, I mlp hidden, E experts):

    embed [V, hidden]        positions [context, hidden] (learned positions only)     head [V, hidden] (untied only)
    final_norm.weight (.bias)
    layers.N.attn_norm.weight (.bias)     layers.N.qkv.weight [(H + 2 K) D, hidden] (.bias)    layers.N.out.weight [hidden, H D] (.bias)
    layers.N.q_norm.weight [D]            layers.N.k_norm.weight [D]    of one norm over all heads, or one for each: [H D] and [K D]
    layers.N.sink_logits [H]
    layers.N.mlp_norm.weight (.bias)      layers.N.attn_post_norm.weight, layers.N.mlp_post_norm.weight (post norms only)
    layers.N.up.weight [2 I, hidden] gate rows first when gated, [I, hidden] otherwise (.bias)
    layers.N.down.weight [hidden, I] (.bias)
    layers.N.router.weight [E, hidden] (.bias)    layers.N.experts.E.up.weight, layers.N.experts.E.down.weight as without experts
    layers.N.shared.up.weight, layers.N.shared.down.weight              layers.N.shared_gate.weight [1, hidden]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Norm:
    """biased: whether a norm of kind "layer" adds a bias; above_one: the checkpoint stores gains less 1. The 1 is added at load, in
    float32 or better."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    biased: bool = True
    above_one: bool = False

    @property
    def bias(self) -> bool:
        return self.kind == "layer" and self.biased


@dataclass(frozen=True)
class Rotary:
    """Half-split rotary positions: pair (i, i + dim / 2) is rotated by position * frequencies[i] (radians, float64). Scaling is
    already applied to the frequencies; `scale` multiplies cos and sin (YaRN), except of the last `still` pairs, which are not rotated."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    still: int = 0

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of each pair."""
        return (*[self.scale] * (len(self.frequencies) - self.still), *[1.0] * self.still)

    @property
    def dim(self) -> int:
        return 2 * len(self.frequencies)


Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True)
class Mlp:
    """limit: None, or gates are at most, and ups within plus and minus this, before the activation; shift: then added to ups. Both belong
    to gated mlps."""

    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: the softmax of the router's logits, of which the `top_k` largest are used, renormalised to sum 1 if
    `renormalise`, which is the softmax of these logits alone. shared: an mlp that all rows use beside the chosen experts; gated: its
    output is multiplied by the sigmoid of a number that each row gives; router_bias: the router's logits have a bias."""

    count: int
    top_k: int
    mlp: Mlp
    renormalise: bool = True
    shared: Mlp | None = None
    gated: bool = False
    router_bias: bool = False


@dataclass(frozen=True)
class Attention:
    """Self-attention over the pages of the text. window: a row at position p sees keys at positions > p - window, None for all;
    qk_norm: a norm of queries and keys before rotary, for each head, with gains of its own if `norm_heads_apart`, or of all heads as one
    vector if `norm_heads_together`; scale: of the scores, None for 1 / sqrt(head_dim); softcap: scores s become softcap * tanh(s /
    softcap); sink_logits: each query head has a learned logit, which is one more score of its softmax, of a slot without a value."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    norm_heads_together: bool = False
    scale: float | None = None
    softcap: float | None = None
    norm_heads_apart: bool = False
    sink_logits: bool = False

    @property
    def score_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class CrossAttention:
    """Attention over the fixed keys and values of a second text, such as an encoder's output. No backend computes it yet."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Recurrent:
    """A state of fixed size per sequence in place of keys and values. state: its shape in one layer. Each row computes its state from
    that of its parent. No shipped backend computes it yet. A kind of recurrence is a subclass with further fields."""

    state: tuple[int, ...]


Mixer = Attention | CrossAttention | Recurrent


@dataclass(frozen=True)
class LayerSpec:
    """norm: of the inputs of mixer and mlp; post_norm: of their outputs, before these are added to the layer's input; parallel: the mlp
    reads the layer's input, not what the mixer added to it; residual: a factor of both outputs, applied last."""

    mixer: Mixer
    mlp: Mlp | Experts
    norm: Norm | None = Norm()
    post_norm: Norm | None = None
    parallel: bool = False
    residual: float = 1.0


class MemoryGroup(NamedTuple):
    """Layers with the same form of memory. kind: pages grow with the text, static pages belong to a second text, a state has a fixed
    size; layers: their indices, ascending; shape: (kv heads, head size) of pages, else that of the state; window: see Attention."""

    kind: Literal["pages", "static", "state"]
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    window: int | None = None


@dataclass(frozen=True)
class WeightSource:
    """Where the checkpoint stores a canonical weight. names: tensors to concatenate along the output dimension; rows: the number of
    rows of each, equal parts if empty; place: (i, n) if the tensor holds n such weights and this is weight i; transposed: stored as
    [in, out]; otherwise: the source to use if the checkpoint lacks the first name; paired: for each name the number of heads whose two
    halves are stored interleaved, 0 for none (GGUF files of Llama); order: for each row of the weight, its row in what is stored; empty:
    as stored; skip: the number of rows that are stored before those of the weight."""

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    place: tuple[int, int] | None = None
    transposed: bool = False
    otherwise: WeightSource | None = None
    paired: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    skip: int = 0


@dataclass(frozen=True)
class ModelSpec:
    vocab: int
    hidden: int
    context: int  # positions that the checkpoint was trained for
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    tied: bool
    source: Callable[[str], WeightSource] = field(repr=False, compare=False)
    learned_positions: int | None = None  # rows of the learned position table
    family: str = ""
    prefix: str = ""  # prefix of tensor names that a checkpoint saved without its head leaves out
    others: tuple[str, ...] = ()  # prefixes of tensors of other models in the same checkpoint, such as of a vision encoder
    embed_scale: float = 1.0  # of embeddings, rounded to the model's dtype
    logit_scale: float = 1.0  # a positive factor of the logits
    logit_softcap: float | None = None  # then logits x become softcap * tanh(x / softcap)

    @cached_property
    def attention(self) -> tuple[Attention, ...]:
        """The mixers of the layers with pages, in order. Layer i of a page pool is entry i."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def kv_heads(self) -> int:
        return self.attention[0].kv_heads if self.attention else 0

    @property
    def head_dim(self) -> int:
        return self.attention[0].head_dim if self.attention else 0

    def memories(self) -> tuple[MemoryGroup, ...]:
        """The layers grouped by the form of their memory, in the order of first use."""
        groups: dict[MemoryGroup, list[int]] = {}
        for i, layer in enumerate(self.layers):
            match layer.mixer:
                case Attention(_, kv_heads, head_dim, window=window):
                    group = MemoryGroup("pages", (), (kv_heads, head_dim), window)
                case CrossAttention(_, kv_heads, head_dim):
                    group = MemoryGroup("static", (), (kv_heads, head_dim))
                case Recurrent(state):
                    group = MemoryGroup("state", (), state)
            groups.setdefault(group, []).append(i)
        return tuple(group._replace(layers=tuple(layers)) for group, layers in groups.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, for every weight that the network has."""
        h = self.hidden
        out: dict[str, tuple[int, ...]] = {"embed": (self.vocab, h)}
        if self.learned_positions is not None:
            out["positions"] = (self.learned_positions, h)
        if not self.tied:
            out["head"] = (self.vocab, h)

        def norm(name: str, n: Norm, size: int) -> None:
            out[f"{name}.weight"] = (size,)
            if n.bias:
                out[f"{name}.bias"] = (size,)

        def linear(name: str, rows: int, cols: int, bias: bool) -> None:
            out[f"{name}.weight"] = (rows, cols)
            if bias:
                out[f"{name}.bias"] = (rows,)

        norm("final_norm", self.final_norm, h)
        for i, layer in enumerate(self.layers):
            at = f"layers.{i}"
            for name in ("attn", "mlp"):
                if layer.norm is not None:
                    norm(f"{at}.{name}_norm", layer.norm, h)
                if layer.post_norm is not None:
                    norm(f"{at}.{name}_post_norm", layer.post_norm, h)
            mixer = layer.mixer
            assert isinstance(mixer, Attention), f"layer {i}: no weights are named for {type(mixer).__name__}"
            linear(f"{at}.qkv", mixer.qkv_rows, h, mixer.qkv_bias)
            linear(f"{at}.out", h, mixer.heads * mixer.head_dim, mixer.out_bias)
            if mixer.qk_norm is not None:
                for name, heads in (("q", mixer.heads), ("k", mixer.kv_heads)):
                    many = mixer.norm_heads_together or mixer.norm_heads_apart
                    norm(f"{at}.{name}_norm", mixer.qk_norm, mixer.head_dim * (heads if many else 1))
            if mixer.sink_logits:
                out[f"{at}.sink_logits"] = (mixer.heads,)
            if isinstance(layer.mlp, Experts):
                linear(f"{at}.router", layer.mlp.count, h, layer.mlp.router_bias)
                each = {f"{at}.experts.{e}": layer.mlp.mlp for e in range(layer.mlp.count)}
                if layer.mlp.shared is not None:
                    each[f"{at}.shared"] = layer.mlp.shared
                if layer.mlp.gated:
                    linear(f"{at}.shared_gate", 1, h, False)
            else:
                each = {at: layer.mlp}
            for one, mlp in each.items():
                linear(f"{one}.up", mlp.hidden * (2 if mlp.gated else 1), h, mlp.bias)
            for one, mlp in each.items():
                linear(f"{one}.down", h, mlp.hidden, mlp.bias)
        return out
