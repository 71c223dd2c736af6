"""Llama 2, 3 and 3.x, SmolLM, and the common part of all families with Llama's layers.

Touvron et al., Llama 2: Open Foundation and Fine-Tuned Chat Models, 2023, arXiv:2307.09288; Grattafiori et al., The
Llama 3 Herd of Models, 2024, arXiv:2407.21783.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from redraft.core.spec import Activation, Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.config import Config, Family
from redraft.models.rotary import context, halves, rotary, turned_dims

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip

# Fields of related architectures. If set, they change the network, even if the checkpoint names a known architecture.
_FOREIGN = (
    "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "logit_scale", "logits_scaling", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "no_rope_layers", "use_qk_norm", "qk_layernorm", "attention_sinks",
)  # fmt: skip

_PARTS = {
    "attn_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_TOP = {
    "embed": "model.embed_tokens.weight", "head": "lm_head.weight",
    "final_norm.weight": "model.norm.weight", "final_norm.bias": "model.norm.bias",
}  # fmt: skip


DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    return decoder(
        config,
        family="llama",
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def decoder(
    config: Config,
    *,
    family: str,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    gated: bool = True,
    qk_norm: bool = False,
    norm: Norm | None = None,
    windows: list[int | None] | None = None,
    turned: list[bool] | None = None,
    experts: list[Experts | None] | None = None,
    parts: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    top: Mapping[str, str] = MappingProxyType({}),
    layers: str = "model.layers",
    source: Callable[[str], WeightSource | None] = lambda name: None,
    known: tuple[str, ...] = (),
    partial: bool = False,
    pairs: Sequence[int] = (),
) -> ModelSpec:
    """A model with Llama's layers. For each layer `windows`, `turned`: whether positions rotate it, `experts`: None for a plain mlp.
    `norm`: RMS if None; `parts`, `top`, `layers`: modules, tensors and a prefix with other names than in Llama; `source`: the tensors of a
    weight, None for weights that follow these names; `known`: fields of other architectures that the family has; `partial`: whether
    positions may rotate a part of a head; `pairs`: the order of a head's dimensions in which (i, i + head_dim / 2) are pairs, empty for
    theirs."""
    refuse(config, tuple(name for name in _FOREIGN if name not in known))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise CheckpointError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    norm = norm or Norm("rms", config.rms_norm_eps)
    mlp = Mlp(config.intermediate_size, activation(config.hidden_act), gated, mlp_bias)
    turn, count, named = rotary(config, head_dim), config.num_hidden_layers, {**_PARTS, **parts}
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if (some := turned_dims(config, head_dim)) < head_dim:
        if not partial:
            raise Unsupported(f"partial_rotary_factor = {some / head_dim:g}: {family} models rotate whole heads")
        pairs = halves(some, head_dim)
    order: tuple[int, ...] = ()
    if pairs:
        values = range((heads + kv_heads) * head_dim, sum(rows))
        order = (*(head * head_dim + dim for head in range(heads + kv_heads) for dim in pairs), *values)

    def place(name: str) -> WeightSource:
        if found := source(name):
            return found
        if name in _TOP:
            return WeightSource(({**_TOP, **top}[name],))
        _, layer, part, kind = name.split(".")
        names = tuple(f"{layers}.{layer}.{p}.{kind}" for p in named[part])
        return WeightSource(names, rows if len(names) > 1 else (), order=order) if part == "qkv" else WeightSource(names)

    return ModelSpec(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        context=context(config),
        layers=tuple(
            LayerSpec(
                Attention(heads, kv_heads, head_dim, turn if turns else None, window, qkv_bias, out_bias, norm if qk_norm else None),
                mixture or mlp,
                norm,
            )
            for window, turns, mixture in zip(windows or [None] * count, turned or [True] * count, experts or [None] * count, strict=True)
        ),
        final_norm=norm,
        tied=config.tie_word_embeddings,
        source=place,
        family=family,
        prefix=f"{layers.split('.')[0]}.",
    )


def changed(
    spec: ModelSpec, *, mixer: Mapping[str, Any] = MappingProxyType({}), layer: Mapping[str, Any] = MappingProxyType({}), **fields: Any
) -> ModelSpec:
    """The spec with other fields of all mixers, of all layers and of the model."""
    return replace(spec, layers=tuple(replace(one, mixer=replace(one.mixer, **mixer), **layer) for one in spec.layers), **fields)


def with_rotary(spec: ModelSpec, rotary: Rotary, kinds: list[str]) -> ModelSpec:
    """The spec with other positions in the layers that slide."""
    near = changed(spec, mixer={"rotary": rotary}).layers
    return replace(spec, layers=tuple(a if kind == SLIDING else b for a, b, kind in zip(near, spec.layers, kinds, strict=True)))


def grouped(heads: int, kv_heads: int, head_dim: int, pairs: Sequence[int] = ()) -> tuple[int, ...]:
    """The order of qkv's rows where a checkpoint stores them by kv head: its queries, its key, its value. pairs: see `decoder`."""
    share, dims = heads // kv_heads, pairs or range(head_dim)
    queries = [head // share * (share + 2) + head % share for head in range(heads)]
    keys = [group * (share + 2) + share for group in range(kv_heads)]
    turned = (place * head_dim + dim for place in (*queries, *keys) for dim in dims)
    return (*turned, *((place + 1) * head_dim + dim for place in keys for dim in range(head_dim)))


def mixture(config: Config, count: int, hidden: int, renormalise: bool) -> Experts:
    """Of experts with an mlp of size `hidden`."""
    if not 0 < config.num_experts_per_tok <= count:
        raise CheckpointError(f"num_experts_per_tok = {config.num_experts_per_tok}: must be 1 to {count}, the number of experts")
    return Experts(count, config.num_experts_per_tok, Mlp(hidden, activation(config.hidden_act)), renormalise)


def activation(name: str) -> Activation:
    """transformers' name of an activation -> ours. Unsupported names an unknown one."""
    if name not in _ACTIVATIONS:
        raise Unsupported(f"activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def refuse(config: Config, fields: tuple[str, ...]) -> None:
    """Unsupported if one of `fields` is set, because ignoring it would give another network."""
    for name in fields:
        if value := getattr(config, name, None):
            raise Unsupported(f"config field {name} = {value!r}")


def windows(config: Config) -> list[int | None]:
    """The window of each layer: by `layer_types`, else from layer `max_window_layers` on. All None without `use_sliding_window`."""
    kinds = kinds_of_layers(config, lambda i: i >= config.max_window_layers)
    return [config.sliding_window if config.use_sliding_window and kind == SLIDING else None for kind in kinds]


SLIDING, FULL = "sliding_attention", "full_attention"


def kinds_of_layers(config: Config, slides: Callable[[int], bool]) -> list[str]:
    """`layer_types`, each SLIDING or FULL; if the config has none, `slides` says it for each layer."""
    count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    if kinds is None:
        return [SLIDING if slides(i) else FULL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"layer_types = {shown(kinds)}: a list of {count} texts, one for each layer, is needed")
    if unknown := sorted(set(kinds) - {SLIDING, FULL}):
        raise Unsupported(f"layer type {unknown[0]!r}")
    return kinds


FAMILY = Family("llama", DEFAULTS, spec, eos=2)
