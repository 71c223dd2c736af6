"""Mixtral: Mistral with a mixture of experts. Jiang et al., Mixtral of Experts, 2024, arXiv:2401.04088."""

from __future__ import annotations

from redraft.core.spec import ModelSpec, WeightSource
from redraft.models import mistral
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, mixture, refuse

DEFAULTS = {
    **mistral.DEFAULTS, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("layer_types",))
    count = config.num_local_experts

    def source(name: str) -> WeightSource | None:
        # Hub checkpoints hold separate matrices for each expert. transformers 5 can also save fused tensors, under `mlp`.
        if ".router." not in name and ".experts." not in name:
            return None
        layer = f"model.layers.{name.split('.')[1]}"
        if name.endswith("router.weight"):
            fused = WeightSource((f"{layer}.mlp.gate.weight",))
            return WeightSource((f"{layer}.block_sparse_moe.gate.weight",), otherwise=fused)
        expert, part = int(name.split(".")[3]), name.split(".")[4]
        fused = WeightSource((f"{layer}.mlp.experts.{'gate_up' if part == 'up' else 'down'}_proj",), place=(expert, count))
        parts = ("w1", "w3") if part == "up" else ("w2",)
        return WeightSource(tuple(f"{layer}.block_sparse_moe.experts.{expert}.{p}.weight" for p in parts), otherwise=fused)

    return decoder(
        config,
        family="mixtral",
        windows=[config.sliding_window] * config.num_hidden_layers,
        experts=[mixture(config, count, config.intermediate_size, renormalise=True)] * config.num_hidden_layers,
        source=source,
    )


FAMILY = Family("mixtral", DEFAULTS, spec, eos=2)
