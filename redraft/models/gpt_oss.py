"""GPT-OSS: experts with biases and clamped gates, a learned sink logit for each query head, a window in every other layer. OpenAI,
gpt-oss-120b & gpt-oss-20b Model Card, 2025, arXiv:2508.10925."""

from __future__ import annotations

from dataclasses import replace

from redraft.core.spec import Mlp, ModelSpec, WeightSource
from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import SLIDING, changed, decoder, kinds_of_layers, mixture

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0, "rope_theta": 150_000.0, "rope_parameters":
    {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    """The shares of the chosen experts are the softmax of their logits alone."""
    for name, only in (("hidden_act", "silu"), ("swiglu_alpha", 1.702)):
        if (value := getattr(config, name)) != only:
            raise Unsupported(f"{name} = {shown(value)}: only {only}")
    limit, window, count, hidden = config.swiglu_limit, config.sliding_window, config.num_local_experts, config.intermediate_size
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1e30:
        raise CheckpointError(f"swiglu_limit = {shown(limit)}: must be a positive number")
    slides = [kind == SLIDING for kind in kinds_of_layers(config, lambda i: i % 2 == 0)]
    if window is None and any(slides):
        raise CheckpointError("sliding_window = None, but layers have a window: must be an integer")
    gates_first = (*range(0, 2 * hidden, 2), *range(1, 2 * hidden, 2))  # stored in turn with ups

    def source(name: str) -> WeightSource | None:
        layer = f"model.layers.{name.split('.')[1]}" if name.startswith("layers.") else ""
        if name.endswith(".sink_logits"):
            return WeightSource((f"{layer}.self_attn.sinks",))
        if ".router." in name:
            return WeightSource((f"{layer}.mlp.router.{name.split('.')[3]}",))
        if ".experts." not in name:
            return None
        _, _, _, expert, part, kind = name.split(".")
        stored = f"{layer}.mlp.experts.{'gate_up' if part == 'up' else 'down'}_proj{'_bias' if kind == 'bias' else ''}"
        order = gates_first if part == "up" else ()
        return WeightSource((stored,), place=(int(expert), count), transposed=kind == "weight", order=order)

    mlp = Mlp(hidden, "quick_gelu", bias=True, limit=float(limit), shift=1.0)
    experts = replace(mixture(config, count, hidden, renormalise=True), mlp=mlp, router_bias=True)
    made = decoder(
        config,
        family="gpt_oss",
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        windows=[window if one else None for one in slides],
        experts=[experts] * config.num_hidden_layers,
        source=source,
    )
    return changed(made, mixer={"sink_logits": True})


FAMILY = Family("gpt_oss", DEFAULTS, spec)
