"""Mistral: Llama's layers with a sliding window. Jiang et al., Mistral 7B, 2023, arXiv:2310.06825."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redraft.core.spec import ModelSpec
from redraft.models.llama import decoder, refuse

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def spec(config: PretrainedConfig) -> ModelSpec:
    refuse(config, ("layer_types",))
    return decoder(config, family="mistral", windows=[config.sliding_window] * config.num_hidden_layers)
