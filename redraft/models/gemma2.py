"""Gemma 2: norms before and after both parts of a layer, soft caps of scores and logits, windows in every second layer. Gemma Team,
Gemma 2: Improving Open Language Models at a Practical Size, 2024, arXiv:2408.00118."""

from __future__ import annotations

from typing import Any

from redraft.core.spec import ModelSpec, Norm
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import SLIDING, changed, decoder, kinds_of_layers, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "tie_word_embeddings": True,
}  # fmt: skip
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def spec(config: Config) -> ModelSpec:
    kinds = kinds_of_layers(config, lambda i: i % 2 == 0)
    return changed(gemma(config, "gemma2", kinds), mixer={"softcap": config.attn_logit_softcapping})


def gemma(config: Config, family: str, kinds: list[str], **options: Any) -> ModelSpec:
    """What Gemma 2 and 3 share. kinds: of the layers; options: of `decoder`."""
    refuse(config, ("use_bidirectional_attention",))
    norm = Norm("rms", config.rms_norm_eps, above_one=True)
    made = decoder(
        Config(**{**vars(config), "hidden_act": config.hidden_activation}),
        family=family,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm=norm,
        windows=[config.sliding_window if kind == SLIDING else None for kind in kinds],
        parts={
            "mlp_norm": ("pre_feedforward_layernorm",),
            "attn_post_norm": ("post_attention_layernorm",),
            "mlp_post_norm": ("post_feedforward_layernorm",),
        },
        known=CAPS,
        **options,
    )
    return changed(
        made,
        mixer={"scale": config.query_pre_attn_scalar**-0.5},
        layer={"post_norm": norm},
        embed_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
    )


FAMILY = Family("gemma2", DEFAULTS, spec, eos=1)
