"""Qwen3 (dense): norms on each head's queries and keys. Yang et al., Qwen3 Technical Report, 2025, arXiv:2505.09388."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redraft.core.spec import ModelSpec
from redraft.models.llama import decoder, windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def spec(config: PretrainedConfig) -> ModelSpec:
    bias = config.attention_bias
    return decoder(config, family="qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows(config))
