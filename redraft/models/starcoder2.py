"""StarCoder2: LayerNorm, biases and a plain mlp around Llama's attention. Lozhkov et al., StarCoder 2 and The Stack v2: The Next
Generation, 2024, arXiv:2402.19173."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, Norm
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, refuse

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5, "sliding_window": None, "use_bias": True, "tie_word_embeddings": True,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    return decoder(
        config,
        family="starcoder2",
        qkv_bias=config.use_bias,
        out_bias=config.use_bias,
        mlp_bias=config.use_bias,
        gated=False,
        norm=Norm("layer", config.norm_epsilon),
        windows=[config.sliding_window] * config.num_hidden_layers,
        parts={"up": ("mlp.c_fc",), "down": ("mlp.c_proj",)},
    )


FAMILY = Family("starcoder2", DEFAULTS, spec, eos=50256)
