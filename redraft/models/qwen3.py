"""Qwen3 (dense): norms on each head's queries and keys. Yang et al., Qwen3 Technical Report, 2025, arXiv:2505.09388."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import qwen2
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, windows


def spec(config: Config) -> ModelSpec:
    bias = config.attention_bias
    return decoder(config, family="qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows(config))


FAMILY = Family("qwen3", {**qwen2.DEFAULTS, "head_dim": 128}, spec)
