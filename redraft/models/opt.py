"""OPT: learned positions, LayerNorm, biases everywhere. Zhang et al., OPT: Open Pre-trained Transformer Language Models, 2022,
arXiv:2205.01068."""

from __future__ import annotations

from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, WeightSource
from redraft.errors import CheckpointError, Unsupported
from redraft.models.config import Config, Family
from redraft.models.llama import activation, refuse

_PARTS = {
    "attn_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "up": ("fc1",),
    "down": ("fc2",),
}
_OFFSET = 2  # rows of the position table that no position uses

DEFAULTS = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "max_position_embeddings": 2048,
    "do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": None, "num_attention_heads": 12,
    "activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("_remove_final_layer_norm",))
    for name in ("do_layer_norm_before", "layer_norm_elementwise_affine"):
        if not getattr(config, name):
            raise Unsupported(f"config field {name} = False")
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.enable_bias
    if config.word_embed_proj_dim not in (None, hidden):
        raise Unsupported(f"config field word_embed_proj_dim = {config.word_embed_proj_dim}: only hidden_size, {hidden}")
    if hidden % heads:
        raise CheckpointError(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    norm = Norm("layer", 1e-5)
    layer = LayerSpec(
        Attention(heads, heads, hidden // heads, qkv_bias=bias, out_bias=bias),
        Mlp(config.ffn_dim, activation(config.activation_function), gated=False, bias=bias),
        norm,
    )
    return ModelSpec(
        vocab=config.vocab_size,
        hidden=hidden,
        context=config.max_position_embeddings,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        tied=config.tie_word_embeddings,
        source=_source,
        learned_positions=config.max_position_embeddings,
        family="opt",
        prefix="model.",
    )


def _source(name: str) -> WeightSource:
    match name.split("."):
        case ["embed"]:
            return WeightSource(("model.decoder.embed_tokens.weight",))
        case ["positions"]:
            return WeightSource(("model.decoder.embed_positions.weight",), skip=_OFFSET)
        case ["head"]:
            return WeightSource(("lm_head.weight",))
        case ["final_norm", kind]:
            return WeightSource((f"model.decoder.final_layer_norm.{kind}",))
        case [_, layer, part, kind]:
            return WeightSource(tuple(f"model.decoder.layers.{layer}.{one}.{kind}" for one in _PARTS[part]))
    raise AssertionError(name)


FAMILY = Family("opt", DEFAULTS, spec, eos=2)
