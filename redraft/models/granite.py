"""Granite: Llama with factors of embeddings, scores, residuals and logits. Granite Team, Granite 3.0 Language Models, 2024."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.errors import CheckpointError, shown
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder

FACTORS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
DEFAULTS = {**llama.DEFAULTS, **dict.fromkeys(FACTORS, 1.0)}


def spec(config: Config) -> ModelSpec:
    bias = config.attention_bias
    made = decoder(config, family="granite", qkv_bias=bias, out_bias=bias, mlp_bias=config.mlp_bias, known=FACTORS)
    return multiplied(made, config)


def multiplied(spec: ModelSpec, config: Config) -> ModelSpec:
    """With the factors of the config."""
    for name in FACTORS:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
            raise CheckpointError(f"{name} = {shown(value)}: must be a positive number")
    return changed(
        spec,
        mixer={"scale": float(config.attention_multiplier)},
        layer={"residual": float(config.residual_multiplier)},
        embed_scale=float(config.embedding_multiplier),
        logit_scale=1 / config.logits_scaling,
    )


FAMILY = Family("granite", DEFAULTS, spec, eos=2)
