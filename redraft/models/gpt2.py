"""GPT-2: learned positions, LayerNorm, biases everywhere. Radford et al., Language Models are Unsupervised Multitask
Learners, 2019."""

from __future__ import annotations

from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, WeightSource
from redraft.errors import CheckpointError, Unsupported
from redraft.models.config import Config, Family
from redraft.models.llama import activation, refuse

_PARTS = {
    "attn_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_TOP = {"embed": "wte.weight", "positions": "wpe.weight", "final_norm.weight": "ln_f.weight", "final_norm.bias": "ln_f.bias"}


DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("scale_attn_by_inverse_layer_idx", "add_cross_attention"))
    if not config.scale_attn_weights:
        raise Unsupported("config field scale_attn_weights = False")
    if config.n_embd % config.n_head:
        raise CheckpointError(f"n_embd = {config.n_embd} is not a multiple of n_head = {config.n_head}")
    norm = Norm("layer", config.layer_norm_epsilon)
    layer = LayerSpec(
        Attention(config.n_head, config.n_head, config.n_embd // config.n_head, qkv_bias=True, out_bias=True),
        Mlp(config.n_inner or 4 * config.n_embd, activation(config.activation_function), gated=False, bias=True),
        norm,
    )
    return ModelSpec(
        vocab=config.vocab_size,
        hidden=config.n_embd,
        context=config.n_positions,
        layers=(layer,) * config.n_layer,
        final_norm=norm,
        tied=config.tie_word_embeddings,
        source=_source,
        learned_positions=config.n_positions,
        family="gpt2",
        prefix="transformer.",
    )


def _source(name: str) -> WeightSource:
    if name == "head":
        return WeightSource(("lm_head.weight",))
    if name in _TOP:
        return WeightSource((f"transformer.{_TOP[name]}",))
    _, layer, part, kind = name.split(".")
    dense = kind == "weight" and part in ("qkv", "out", "up", "down")  # Conv1D stores [in, out]
    return WeightSource((f"transformer.h.{layer}.{_PARTS[part]}.{kind}",), transposed=dense)


FAMILY = Family("gpt2", DEFAULTS, spec, eos=50256)
