"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a window on the upper layers.

Yang et al., Qwen2 Technical Report, 2024, arXiv:2407.10671.
"""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, windows

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    return decoder(config, family="qwen2", qkv_bias=True, windows=windows(config))


FAMILY = Family("qwen2", DEFAULTS, spec)
