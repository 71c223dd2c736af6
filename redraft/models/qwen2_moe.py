"""Qwen2 with mixtures of experts and an expert that all tokens share. Yang et al., Qwen2 Technical Report, 2024, arXiv:2407.10671."""

from __future__ import annotations

from dataclasses import replace

from redraft.core.spec import Mlp, ModelSpec, WeightSource
from redraft.models import qwen2
from redraft.models.config import Config, Family
from redraft.models.llama import SLIDING, activation, decoder, kinds_of_layers, mixture
from redraft.models.qwen3_moe import experts_source, with_experts

DEFAULTS = {
    **qwen2.FAMILY.defaults, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768, "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
    "norm_topk_prob": False, "mlp_only_layers": None, "qkv_bias": True,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    shared = Mlp(config.shared_expert_intermediate_size, activation(config.hidden_act))
    experts = replace(mixture(config, count, config.moe_intermediate_size, config.norm_topk_prob), shared=shared, gated=True)
    chosen = experts_source(count)

    def source(name: str) -> WeightSource | None:
        if ".shared" not in name:
            return chosen(name)
        _, layer, part, *rest = name.split(".")
        mlp = f"model.layers.{layer}.mlp"
        if part == "shared_gate":
            return WeightSource((f"{mlp}.shared_expert_gate.weight",))
        parts = ("gate", "up") if rest[0] == "up" else ("down",)
        return WeightSource(tuple(f"{mlp}.shared_expert.{one}_proj.weight" for one in parts))

    slides = config.use_sliding_window
    kinds = kinds_of_layers(config, lambda i: slides and i % 2 == 0 and i < config.max_window_layers)
    return decoder(
        config,
        family="qwen2_moe",
        qkv_bias=config.qkv_bias,
        windows=[config.sliding_window if slides and kind == SLIDING else None for kind in kinds],
        experts=with_experts(config, experts),
        source=source,
    )


FAMILY = Family("qwen2_moe", DEFAULTS, spec)
