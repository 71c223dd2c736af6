"""GPT-NeoX and Pythia: attention and mlp read the same input, a quarter of each head is rotated. Black et al., GPT-NeoX-20B: An
Open-Source Autoregressive Language Model, 2022, arXiv:2204.06745; Biderman et al., Pythia, 2023, arXiv:2304.01373."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, Norm, WeightSource
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder, grouped
from redraft.models.rotary import halves, turned_dims

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True,
    "rotary_pct": 0.25, "rotary_emb_base": None,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    theta, part = getattr(config, "rotary_emb_base", None) or 10_000.0, getattr(config, "rotary_pct", 0.25)
    config = Config(**{**vars(config), "rope_theta": theta, "partial_rotary_factor": part, "num_key_value_heads": None, "head_dim": None})
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    order = grouped(heads, heads, size, halves(turned_dims(config, size), size))

    def source(name: str) -> WeightSource | None:
        _, layer, *part = name.split(".") if ".qkv." in name else ("", "")
        fused = WeightSource((f"gpt_neox.layers.{layer}.attention.query_key_value.{part[-1]}",), order=order) if part else None
        return WeightSource(("embed_out.weight",), otherwise=WeightSource(("lm_head.weight",))) if name == "head" else fused

    made = decoder(
        config,
        family="gpt_neox",
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=True,
        gated=False,
        norm=Norm("layer", config.layer_norm_eps),
        parts={"out": ("attention.dense",), "up": ("mlp.dense_h_to_4h",), "down": ("mlp.dense_4h_to_h",)},
        top={
            "embed": "gpt_neox.embed_in.weight",
            "final_norm.weight": "gpt_neox.final_layer_norm.weight",
            "final_norm.bias": "gpt_neox.final_layer_norm.bias",
        },
        layers="gpt_neox.layers",
        source=source,
        partial=True,
    )
    return changed(made, layer={"parallel": config.use_parallel_residual})


FAMILY = Family("gpt_neox", DEFAULTS, spec, eos=2)
