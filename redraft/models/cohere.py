"""Cohere's Command R: LayerNorm without bias, attention and mlp that read the same input, neighbouring dimensions as rotated pairs, a
factor of the logits. Cohere, Command R, 2024."""

from __future__ import annotations

from typing import Any

from redraft.core.spec import ModelSpec, Norm
from redraft.errors import CheckpointError, shown
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
    "logit_scale": 0.0625, "use_qk_norm": False, "rope_theta": 500_000.0,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("use_qk_norm", "layer_types"))
    return command(config, "cohere")


def command(config: Config, family: str, **options: Any) -> ModelSpec:
    """What Command R and R7B share. options: of `decoder`."""
    scale = config.logit_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1e-30 < scale < 1e30:
        raise CheckpointError(f"logit_scale = {shown(scale)}: must be a positive number")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = decoder(
        config,
        family=family,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm=Norm("layer", config.layer_norm_eps, biased=False),
        parts={"mlp_norm": ("input_layernorm",)},
        known=("logit_scale",),
        pairs=(*range(0, size, 2), *range(1, size, 2)),
        **options,
    )
    return changed(made, layer={"parallel": True}, logit_scale=float(scale))


FAMILY = Family("cohere", DEFAULTS, spec, eos=255001)
