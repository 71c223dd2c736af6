"""OLMo 2: norms only after the parts of a layer, and of all queries and all keys as one vector each. Walsh et al., 2 OLMo 2 Furious,
2025, arXiv:2501.00656."""

from __future__ import annotations

from typing import Any

from redraft.core.spec import ModelSpec, Norm
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import changed, decoder, refuse

DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    return olmo(config, "olmo2")


def olmo(config: Config, family: str, **options: Any) -> ModelSpec:
    """What OLMo 2 and 3 share. options: of `decoder`."""
    made = decoder(
        config,
        family=family,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norm=True,
        parts={"attn_post_norm": ("post_attention_layernorm",), "mlp_post_norm": ("post_feedforward_layernorm",)},
        **options,
    )
    norm = Norm("rms", config.rms_norm_eps)
    return changed(made, mixer={"norm_heads_together": True}, layer={"norm": None, "post_norm": norm})


FAMILY = Family("olmo2", DEFAULTS, spec, eos=50279)
