"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a window on the upper layers.

Yang et al., Qwen2 Technical Report, 2024, arXiv:2407.10671.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redraft.core.spec import ModelSpec
from redraft.models.llama import decoder, windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def spec(config: PretrainedConfig) -> ModelSpec:
    return decoder(config, family="qwen2", qkv_bias=True, windows=windows(config))
