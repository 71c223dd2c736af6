"""Falcon: one key and value for all queries or for groups of them, attention and mlp that read the same input. Almazrouei et al., The
Falcon Series of Open Language Models, 2023, arXiv:2311.16867."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, Norm, WeightSource
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder, grouped, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 65024, "hidden_size": 4544, "num_attention_heads": 71, "layer_norm_epsilon": 1e-5, "activation": "gelu",
    "alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False, "num_kv_heads": None,
    "num_ln_in_parallel_attn": None, "ffn_hidden_size": None, "tie_word_embeddings": True,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    """`new_decoder_architecture` has groups of queries and two norms, unless `num_ln_in_parallel_attn` is 1; `multi_query` one key and
    value."""
    refuse(config, ("alibi", "layer_types"))
    heads, new = config.num_attention_heads, config.new_decoder_architecture
    kv_heads = (config.num_kv_heads or heads) if new else 1 if config.multi_query else heads
    order = grouped(heads, kv_heads, config.hidden_size // heads) if heads % kv_heads == 0 else ()
    parallel = config.parallel_attn or new
    two = new and config.num_ln_in_parallel_attn in (None, 2)
    attn_norm, mlp_norm = (
        ("ln_attn", "ln_mlp") if two else ("input_layernorm",) * 2 if parallel else ("input_layernorm", "post_attention_layernorm")
    )

    def source(name: str) -> WeightSource | None:
        if ".qkv." not in name:
            return None
        _, layer, _, kind = name.split(".")
        return WeightSource((f"transformer.h.{layer}.self_attention.query_key_value.{kind}",), order=order)

    own = {
        "hidden_act": config.activation, "num_key_value_heads": kv_heads, "head_dim": None,
        "intermediate_size": config.ffn_hidden_size or 4 * config.hidden_size,
    }  # fmt: skip
    made = decoder(
        Config(**{**vars(config), **own}),
        family="falcon",
        qkv_bias=config.bias,
        out_bias=config.bias,
        mlp_bias=config.bias,
        gated=False,
        norm=Norm("layer", config.layer_norm_epsilon),
        parts={
            "attn_norm": (attn_norm,),
            "mlp_norm": (mlp_norm,),
            "out": ("self_attention.dense",),
            "up": ("mlp.dense_h_to_4h",),
            "down": ("mlp.dense_4h_to_h",),
        },
        top={
            "embed": "transformer.word_embeddings.weight",
            "final_norm.weight": "transformer.ln_f.weight",
            "final_norm.bias": "transformer.ln_f.bias",
        },
        layers="transformer.h",
        source=source,
    )
    return changed(made, layer={"parallel": parallel})


FAMILY = Family("falcon", DEFAULTS, spec, eos=11)
