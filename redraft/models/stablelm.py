"""StableLM: LayerNorm around Llama's attention, of which positions rotate a quarter. Larger models norm each head of queries and keys
with gains of its own, and attention and mlp read the same input. Bellagamba et al., Stable LM 2 1.6B Technical Report, 2024,
arXiv:2402.17834."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, Norm, WeightSource
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder, refuse
from redraft.models.rotary import halves, turned_dims

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False, "qk_layernorm": False,
    "use_parallel_residual": False,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    parallel, apart, eps = config.use_parallel_residual, config.qk_layernorm, config.layer_norm_eps
    size = config.hidden_size // config.num_attention_heads

    def source(name: str) -> WeightSource | None:
        if "q_norm" not in name and "k_norm" not in name:
            return None
        _, layer, part, _ = name.split(".")
        count = config.num_attention_heads if part == "q_norm" else config.num_key_value_heads
        order = tuple(head * size + dim for head in range(count) for dim in halves(turned_dims(config, size), size))
        at = f"model.layers.{layer}.self_attn.{part[0]}_layernorm.norms"
        return WeightSource(tuple(f"{at}.{head}.weight" for head in range(count)), order=order)

    made = decoder(
        config,
        family="stablelm",
        qkv_bias=config.use_qkv_bias,
        norm=Norm("layer", eps),
        parts={"mlp_norm": ("input_layernorm",)} if parallel else {},
        source=source,
        known=("qk_layernorm",),
        partial=True,
    )
    mixer = {"qk_norm": Norm("layer", eps, biased=False), "norm_heads_apart": True} if apart else {}
    return changed(made, mixer=mixer, layer={"parallel": parallel})


FAMILY = Family("stablelm", DEFAULTS, spec, eos=0)
