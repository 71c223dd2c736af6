"""Mistral: Llama's layers with a sliding window. Jiang et al., Mistral 7B, 2023, arXiv:2310.06825."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, refuse

DEFAULTS = {
    **llama.DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    return decoder(config, family="mistral", windows=[config.sliding_window] * config.num_hidden_layers)


FAMILY = Family("mistral", DEFAULTS, spec, eos=2)
