"""Granite with mixtures of experts. Granite Team, Granite 3.0 Language Models, 2024."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, WeightSource
from redraft.models import granite
from redraft.models.config import Config, Family
from redraft.models.granite import FACTORS, multiplied
from redraft.models.llama import decoder, mixture

DEFAULTS = {**granite.DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}


def spec(config: Config) -> ModelSpec:
    count, bias = config.num_local_experts, config.attention_bias
    experts = mixture(config, count, config.intermediate_size, True)

    def source(name: str) -> WeightSource | None:
        if ".router." not in name and ".experts." not in name:
            return None
        at = f"model.layers.{name.split('.')[1]}.block_sparse_moe"
        if name.endswith("router.weight"):
            return WeightSource((f"{at}.router.layer.weight",), otherwise=WeightSource((f"{at}.router.weight",)))
        place, up = (int(name.split(".")[3]), count), name.split(".")[4] == "up"
        newer = WeightSource((f"{at}.experts.{'gate_up' if up else 'down'}_proj",), place=place)
        return WeightSource((f"{at}.{'input' if up else 'output'}_linear.weight",), place=place, otherwise=newer)

    layers = config.num_hidden_layers
    made = decoder(
        config, family="granitemoe", qkv_bias=bias, out_bias=bias, experts=[experts] * layers, source=source, known=FACTORS
    )  # fmt: skip
    return multiplied(made, config)


FAMILY = Family("granitemoe", DEFAULTS, spec, eos=2)
