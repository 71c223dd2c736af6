"""StableLM: LayerNorm around Llama's attention, of which positions rotate a quarter. Bellagamba et al., Stable LM 2 1.6B Technical
Report, 2024, arXiv:2402.17834."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, Norm
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False, "qk_layernorm": False,
    "use_parallel_residual": False,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("use_parallel_residual", "layer_types"))
    return decoder(config, family="stablelm", qkv_bias=config.use_qkv_bias, norm=Norm("layer", config.layer_norm_eps), partial=True)


FAMILY = Family("stablelm", DEFAULTS, spec, eos=0)
