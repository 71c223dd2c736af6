"""Phi-3 and Phi-4: Llama with fused matrices. Abdin et al., Phi-3 Technical Report: A Highly Capable Language Model
Locally on Your Phone, 2024, arXiv:2404.14219."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    return decoder(
        config,
        family="phi3",
        windows=[config.sliding_window] * config.num_hidden_layers,
        parts={"qkv": ("self_attn.qkv_proj",), "up": ("mlp.gate_up_proj",)},
        partial=True,
    )


FAMILY = Family("phi3", DEFAULTS, spec, eos=32000)
