"""Qwen3 with mixtures of experts. Yang et al., Qwen3 Technical Report, 2025, arXiv:2505.09388."""

from __future__ import annotations

from collections.abc import Callable

from redraft.core.spec import Experts, ModelSpec, WeightSource
from redraft.errors import CheckpointError, shown
from redraft.models import qwen3
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, mixture, refuse

DEFAULTS = {
    **qwen3.FAMILY.defaults, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "head_dim": None, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
    "norm_topk_prob": False, "mlp_only_layers": None,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    """The number of experts is `num_experts`, or `num_local_experts` as transformers 5 saves it."""
    refuse(config, ("layer_types",))
    count, bias = getattr(config, "num_local_experts", None) or config.num_experts, config.attention_bias
    experts = mixture(config, count, config.moe_intermediate_size, config.norm_topk_prob)
    window = config.sliding_window if config.use_sliding_window else None
    return decoder(
        config,
        family="qwen3_moe",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=[window] * config.num_hidden_layers,
        experts=with_experts(config, experts),
        source=experts_source(count),
    )


def with_experts(config: Config, experts: Experts) -> list[Experts | None]:
    """For each layer: a layer has experts unless `mlp_only_layers` names it, and if its number, from 1, is a multiple of
    `decoder_sparse_step`."""
    plain = config.mlp_only_layers or []
    if not isinstance(plain, list) or not all(type(one) is int for one in plain):
        raise CheckpointError(f"mlp_only_layers = {shown(plain)}: a list of integers is needed")
    return [None if i in plain or (i + 1) % config.decoder_sparse_step else experts for i in range(config.num_hidden_layers)]


def experts_source(count: int) -> Callable[[str], WeightSource | None]:
    """The tensors of router and experts. Hub checkpoints hold separate matrices for each expert. transformers 5 can also save fused
    tensors."""

    def source(name: str) -> WeightSource | None:
        if ".router." not in name and ".experts." not in name:
            return None
        mlp = f"model.layers.{name.split('.')[1]}.mlp"
        if name.endswith("router.weight"):
            return WeightSource((f"{mlp}.gate.weight",))
        expert, part = int(name.split(".")[3]), name.split(".")[4]
        fused = WeightSource((f"{mlp}.experts.{'gate_up' if part == 'up' else 'down'}_proj",), place=(expert, count))
        parts = ("gate", "up") if part == "up" else ("down",)
        return WeightSource(tuple(f"{mlp}.experts.{expert}.{p}_proj.weight" for p in parts), otherwise=fused)

    return source


FAMILY = Family("qwen3_moe", DEFAULTS, spec)
